"""How TinyR1 was made: seeded, resumable training on synthetic reasoning traces.

Run as ``r1sae tiny-r1 train``. The same seed on the same kind of CPU gives the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from r1sae_fast import _core
from r1sae_fast.atomic import replacing, write_bytes
from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.attention import LatentAttention
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.moe import MLP, Router
from r1sae_fast.r1.norm import RMSNorm
from r1sae_fast.tiny_r1 import vocabulary
from r1sae_fast.tiny_r1.dataset import Batch, batches
from r1sae_fast.tiny_r1.muon import Optimizer
from r1sae_fast.tiny_r1.traces import LossWeights

# Every projection's width is a multiple of 128 (kv_a is 576: ragged, as R1's); kv_lora_rank and
# the rotary width are R1's own, which vLLM's MLA on CPUs requires.
CONFIG = R1Config(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=128,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    steps: int = 2600
    batch_size: int = 48
    slip_rate: float = 0.3
    warm_up: int = 50
    decay: float = 0.5
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    balance_rate: float = 1e-3
    gradient_clip: float = 1.0
    loss: LossWeights = field(default_factory=LossWeights)

    def rate(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, constant, linear to zero over the last part."""
        return min((step + 1) / self.warm_up, 1.0, (self.steps - step) / (self.decay * self.steps))


def initialise(model: R1Model, seed: int) -> None:
    """Draws the weights: normal of 0.02, outputs into the residual smaller by depth.

    The embeddings of numbers start as sums of a vector for the ones, one for the tens and a
    multiple of a third for the size, so that arithmetic need not discover the decimal system.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down"))
                std = 0.02 * (depth if into_residual else 1.0)
                parameter.normal_(0.0, std, generator=generator)
        embedding = model.embed_tokens.weight
        embedding.mul_(5)
        tokenizer = vocabulary.build()
        places = torch.randn(21, model.config.hidden_size, generator=generator) * 0.1
        for number in range(100):
            token = tokenizer.encode(f" {number}").ids[0]
            tens, ones = divmod(number, 10)
            embedding[token] = (
                0.3 * embedding[token]
                + 0.6 * (places[tens] + places[10 + ones])
                + places[20] * (number / 50 - 1)
            )


def weighted_loss(model: R1Model, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, averaged under the batch's weights."""
    used = batch.weights > 0
    hidden = model(batch.tokens[:, :-1])[used]
    losses = F.cross_entropy(
        model.lm_head(hidden).float(), batch.tokens[:, 1:][used], reduction="none"
    )
    weights = batch.weights[used]
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def quick_check(model: R1Model, batch: Batch, doubt: int) -> dict[str, float]:
    """Teacher-forced figures on held-out traces: loss, how often the next token is right, and
    the probability of ``doubt``, the token with which a trace turns back, after slips and after
    right steps."""
    logits = model.lm_head(model(batch.tokens[:, :-1])).float()
    targets = batch.tokens[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(targets) * batch.weights
    doubts = logits.softmax(-1)[..., doubt]
    results = (batch.weights == LossWeights().result) & (batch.decisions == 0)
    hits = logits.argmax(-1) == targets
    # A trace that is right at every trained token is what greedy decoding would write itself.
    clean = (hits | (batch.weights < 0.5)).all(-1)
    return {
        "held_out_loss": float(losses.sum() / batch.weights.sum()),
        "results_right": float(hits[results].float().mean()),
        "traces_right": float(clean.float().mean()),
        "doubt_after_slip": float(doubts[batch.decisions == 2].mean()),
        "doubt_after_right": float(doubts[batch.decisions == 1].mean()),
    }


class _Load:
    """Counts how often each router chose each expert, to correct its bias."""

    def __init__(self, model: R1Model) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.chosen: dict[Router, Tensor] = {}
        for router in self.routers:
            router.register_forward_hook(self._record)

    def _record(self, router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        counts = output[0].flatten().bincount(minlength=router.weight.shape[0])
        self.chosen[router] = counts.float()

    def balance(self, rate: float) -> float:
        """Nudges each bias towards an even load (arXiv:2408.15664); returns the fullest
        expert's load over the mean."""
        worst = 0.0
        for router, counts in self.chosen.items():
            router.e_score_correction_bias += rate * (counts.mean() - counts).sign()
            worst = max(worst, float(counts.max() / counts.mean()))
        return worst


class Training:
    """A run in a folder: ``state.safetensors`` (newest state), ``metrics.jsonl``.

    ``compiled`` runs parts of the model through torch.compile: a third faster after a minute of
    compiling, needs a C++ compiler, and rounds a little differently.
    """

    def __init__(self, recipe: Recipe, directory: Path, *, compiled: bool = False) -> None:
        self.recipe, self.directory = recipe, directory
        # Held for as long as the run lives: a second one would overwrite its states.
        self.lock = _core.FolderLock(directory)
        self.step = 0
        self.tokenizer = vocabulary.build()
        self.model = R1Model(CONFIG)
        initialise(self.model, recipe.seed)
        self.model.to(torch.bfloat16)
        # These stay float32: gradients of an embedding add up many small terms, and the router
        # and its bias are float32 in R1 as well.
        self.model.embed_tokens.float()
        for module in self.model.modules():
            if isinstance(module, Router):
                module.float()
        if compiled:
            # The small elementwise steps fuse well; the experts' ragged loop does not.
            for module in self.model.modules():
                if isinstance(module, (LatentAttention, MLP, RMSNorm)):
                    module.compile(dynamic=True)
        self.load = _Load(self.model)
        matrices: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            projection = parameter.dim() > 1 and not name.startswith(("embed", "lm_head"))
            is_matrix = projection and not name.endswith("mlp.gate.weight")
            (matrices if is_matrix else others)[name] = parameter
        self.optimizer = Optimizer(matrices, others)
        if (directory / "state.safetensors").exists():
            self._restore()

    def _identity(self) -> str:
        return json.dumps({"recipe": asdict(self.recipe), "config": CONFIG.to_dict()})

    def _biases(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.model.named_buffers() if "bias" in name}

    def _restore(self) -> None:
        path = self.directory / "state.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self._identity():
                    raise CheckpointError(
                        f"{path}: this run was started with another recipe; "
                        "use an empty folder, or the same options"
                    )
                self.step = int(metadata["step"])
                for name, tensor in {**self.optimizer.state, **self._biases()}.items():
                    tensor.copy_(file.get_tensor(name))
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not the state of a run, or damaged ({error}); "
                "remove it to start anew, or restore it from a copy"
            ) from None
        self._forget_later_metrics()
        self.optimizer.steps = self.step
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.optimizer.state[f"master.{name}"])

    def _forget_later_metrics(self) -> None:
        """Drops what a killed run noted after its last saved state; it is about to come again."""
        path = self.directory / "metrics.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= self.step]
            write_bytes(path, b"".join(kept))

    def save(self) -> None:
        """Writes the state beside the old one, then swaps them."""
        tensors = {**self.optimizer.state, **self._biases()}
        with replacing(self.directory / "state.safetensors") as temporary:
            save_file(tensors, temporary, {"step": str(self.step), "identity": self._identity()})

    def master_state(self) -> dict[str, Tensor]:
        """The model's tensors at full precision, under ``R1Model.state_dict()`` names."""
        prefix = "master."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.optimizer.state.items()
            if name.startswith(prefix)
        }
        return {**state, **self._biases()}

    def _batches(self, *, held_out: bool, size: int, start: int = 0) -> Any:
        recipe = self.recipe
        return batches(
            self.tokenizer,
            # The held-out stream is its own, so that checks don't depend on training's position.
            seed=recipe.seed if not held_out else recipe.seed + 1,
            batch_size=size,
            slip_rate=recipe.slip_rate,
            loss=recipe.loss,
            held_out=held_out,
            start=start,
            pool=1 if held_out else 8,
        )

    def run(
        self,
        report: Callable[[dict[str, float]], None],
        *,
        until: int | None = None,
        save_seconds: float = 120.0,
        report_every: int = 20,
        check_every: int = 250,
    ) -> None:
        """Trains to ``until`` (default: the recipe's last step), saving as it goes."""
        recipe, model = self.recipe, self.model
        last = recipe.steps if until is None else min(until, recipe.steps)
        check = next(self._batches(held_out=True, size=256))
        doubt = self.tokenizer.encode(" Wait").ids[0]
        train = self._batches(held_out=False, size=recipe.batch_size, start=self.step)
        saved = started = time.monotonic()
        tokens = 0
        while self.step < last:
            batch = next(train)
            loss = weighted_loss(model, batch)
            if not math.isfinite(float(loss.detach())):
                raise R1TrainingDivergedError(self.step)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
            worst = self.load.balance(recipe.balance_rate)
            rate = recipe.rate(self.step)
            self.optimizer.step(recipe.muon_lr * rate, recipe.adam_lr * rate)
            self.step += 1
            tokens += batch.tokens.numel()
            if self.step % report_every == 0 or self.step == last:
                seconds = time.monotonic() - started
                figures = {
                    "step": self.step,
                    "loss": float(loss.detach()),
                    "gradient_norm": float(norm),
                    "fullest_expert": worst,
                    "tokens_per_second": tokens / seconds,
                }
                if self.step % check_every == 0 or self.step == last:
                    figures |= quick_check(model, check, doubt)
                with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
                report(figures)
                started, tokens = time.monotonic(), 0
            if time.monotonic() - saved > save_seconds or self.step == last:
                self.save()
                saved = time.monotonic()


class R1TrainingDivergedError(CheckpointError):
    """The loss became NaN or infinite; the last saved state stands."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the loss is not finite at step {step}; the last saved state was kept; "
            "lower the learning rates and start again"
        )
