"""How good an SAE is: on activations, inside the running model, and in what the model answers."""

from r1sae_fast.evals.answers import Answers, evaluate_all_answers, evaluate_answers
from r1sae_fast.evals.decoder import DecoderSimilarity, decoder_similarity
from r1sae_fast.evals.figures import DensityHistogram, Figures, Reconstruction
from r1sae_fast.evals.in_model import InModel, Losses, evaluate_all_in_model, evaluate_in_model
from r1sae_fast.evals.reconstruction import evaluate_reconstruction
from r1sae_fast.evals.report import read_report, write_report

__all__ = [
    "Answers",
    "DecoderSimilarity",
    "DensityHistogram",
    "Figures",
    "InModel",
    "Losses",
    "Reconstruction",
    "decoder_similarity",
    "evaluate_all_answers",
    "evaluate_all_in_model",
    "evaluate_answers",
    "evaluate_in_model",
    "evaluate_reconstruction",
    "read_report",
    "write_report",
]
