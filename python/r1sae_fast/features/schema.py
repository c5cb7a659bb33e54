"""The tables of a feature database.

``tokens``, ``activations`` and ``autointerp`` are those of the released R1 databases (plus the
column ``segment``); a released file has only these, in one file or in several.
"""

FORMAT = "r1sae-features"
VERSION = "1"

SEGMENTS = {0: "prompt", 1: "thinking", 2: "response"}
"""Names of the segments, by the number that shards hold; any other number is NULL here."""

TABLES = {
    # One row a token. Sorted by sequence and place.
    "tokens": """
        sequence_id BIGINT, token_idx INTEGER, token INTEGER, decoded_token VARCHAR,
        segment VARCHAR""",
    # One row each time that a feature is active. Sorted by feature, strongest first: the rows of
    # a feature lie together, so that a query reads these alone.
    "activations": "feature_id INTEGER, sequence_id BIGINT, token_idx INTEGER, strength FLOAT",
    # Labels; several of a feature may stand side by side, told apart by model_name. Labels with
    # model_name 'statistics' are counted, not written by a model: quality and interestingness are
    # a judge's ratings, so they are NULL there.
    "autointerp": """
        feature_id INTEGER, label VARCHAR, quality DOUBLE, interestingness DOUBLE,
        model_name VARCHAR, prompt_version VARCHAR""",
    # One row a feature, dead ones too. A density is the share of (the segment's) tokens where the
    # feature is active; mean is over active tokens; clarity is the share of its strength
    # that the statistical label explains beyond chance, from 0 to 1.
    "features": """
        feature_id INTEGER, count BIGINT, density DOUBLE, mean DOUBLE, max FLOAT,
        histogram BIGINT[], density_prompt DOUBLE, density_thinking DOUBLE,
        density_response DOUBLE, clarity DOUBLE""",
    # The strongest tokens of each feature, rank 1 first.
    "examples": """
        feature_id INTEGER, rank INTEGER, sequence_id BIGINT, token_idx INTEGER, strength FLOAT""",
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
