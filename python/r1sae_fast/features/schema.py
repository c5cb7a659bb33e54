"""The tables of a feature database.

``tokens``, ``activations`` and ``autointerp`` are those of the released R1 databases (plus the
column ``segment``); a released file has only these, in one file or in several.
"""

FORMAT = "r1sae-features"
VERSION = "3"

SEGMENTS = {0: "prompt", 1: "thinking", 2: "response"}
"""Names of the segments, by the number that shards hold; any other number is NULL here."""

POSITION_EDGES = (0, *(1 << i for i in range(18)))
"""Positions are counted in bins [0, 1), [1, 2), [2, 4), ... [65536, 131072), [131072, ...)."""

NEGATIVE_WINDOW = 16
"""Around a negative, the feature is active on none of so many tokens on either side."""

TABLES = {
    # One row a token. Sorted by sequence and place.
    "tokens": """
        sequence_id BIGINT, token_idx INTEGER, token INTEGER, decoded_token VARCHAR,
        segment VARCHAR""",
    # One row each time that a feature is active. Sorted by feature, then by place: the rows of a
    # feature lie together, so that a query reads these alone. How numbers are packed is said, as
    # trying all ways on each row group takes an eighth of the time of writing.
    "activations": """
        feature_id INTEGER USING COMPRESSION rle, sequence_id BIGINT USING COMPRESSION bitpacking,
        token_idx INTEGER USING COMPRESSION bitpacking, strength FLOAT""",
    # Labels; several of a feature may stand side by side, told apart by model_name. Labels with
    # model_name 'statistics' are counted, not written by a model: quality and interestingness are
    # a judge's ratings, so they are NULL there.
    "autointerp": """
        feature_id INTEGER, label VARCHAR, quality DOUBLE, interestingness DOUBLE,
        model_name VARCHAR, prompt_version VARCHAR""",
    # One row a feature, dead ones too. A density is the share of (the segment's) tokens where the
    # feature is active; mean is over active tokens; clarity is the share of its strength
    # that the statistical label explains beyond chance, from 0 to 1. histogram counts strengths
    # (meta has the edges), position_counts active tokens by their place (see POSITION_EDGES; the
    # table positions has how many tokens there are).
    "features": """
        feature_id INTEGER, count BIGINT, density DOUBLE, mean DOUBLE, max FLOAT,
        histogram BIGINT[], density_prompt DOUBLE, density_thinking DOUBLE,
        density_response DOUBLE, position_counts BIGINT[], clarity DOUBLE""",
    # Tokens of each segment and of each bin of positions [low, high): what densities divide by.
    "segments": "segment VARCHAR, tokens BIGINT",
    "positions": "bin INTEGER, low BIGINT, high BIGINT, tokens BIGINT",
    # The strongest tokens of each feature, rank 1 first; at most one of a sequence, unless the
    # database was built with another per_sequence.
    "examples": """
        feature_id INTEGER, rank INTEGER, sequence_id BIGINT, token_idx INTEGER, strength FLOAT""",
    # Samples of all strengths. A feature's activations in the order of strength are cut into as
    # many intervals (quantile 0: the weakest) of equal numbers; of each some are drawn at random,
    # rank 1 first. low and high are the interval's least and largest strength, count its size.
    "intervals": """
        feature_id INTEGER, quantile INTEGER, rank INTEGER, low FLOAT, high FLOAT, count BIGINT,
        sequence_id BIGINT, token_idx INTEGER, strength FLOAT""",
    # Random places where the feature is not active, nor within NEGATIVE_WINDOW tokens of them.
    # Features that are active nearly everywhere have fewer of them, or none.
    "negatives": """
        feature_id INTEGER, rank INTEGER, sequence_id BIGINT, token_idx INTEGER""",
    # The features that are most often active on the same tokens, by pointwise mutual information:
    # pmi = log2(P(both) / (P(one) P(other))), of pairs that met at least five times.
    "coactivations": """
        feature_id INTEGER, rank INTEGER, other_id INTEGER, count BIGINT, pmi DOUBLE""",
    # The features whose decoder directions are nearest. Empty if the build was given no SAE.
    "neighbours": "feature_id INTEGER, rank INTEGER, other_id INTEGER, cosine FLOAT",
    # How well labels tell a feature's contexts from others; a label is named by the first three
    # columns (as in autointerp), judge is the model that answered, scorer 'detection' or
    # 'fuzzing'. A figure that nothing was answered for is NULL; unanswered contexts count in none.
    "scores": """
        feature_id INTEGER, model_name VARCHAR, prompt_version VARCHAR, scorer VARCHAR,
        judge VARCHAR, balanced_accuracy DOUBLE, f1 DOUBLE, precision DOUBLE, recall DOUBLE,
        true_positives INTEGER, false_negatives INTEGER, true_negatives INTEGER,
        false_positives INTEGER, unanswered INTEGER""",
    # What a label and its scores took: answers, their tokens, and money where prices were told.
    "label_usage": """
        feature_id INTEGER, model_name VARCHAR, prompt_version VARCHAR, requests INTEGER,
        prompt_tokens BIGINT, completion_tokens BIGINT, cost DOUBLE""",
    # The tokens that tell most about each feature: token_offset 0 is the token on which it fires,
    # -1 the one before, 1 the one after. share = P(token | fires), base = P(token),
    # lift = share / base, weighted_share = share with each activation counted by its strength.
    "token_lift": """
        feature_id INTEGER, token_offset INTEGER, rank INTEGER, token INTEGER,
        decoded_token VARCHAR, count BIGINT, share DOUBLE, weighted_share DOUBLE, base DOUBLE,
        lift DOUBLE, score DOUBLE""",
    # What the database is of: format, version, d_sae, rows, and whatever the builder was told.
    "meta": "key VARCHAR, value VARCHAR",
}

REQUIRED = ("tokens", "activations")
"""What a file must have to be opened as a feature database."""
