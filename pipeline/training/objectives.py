"""What a step of each stage computes: forward pass, loss, backward pass. All stages share the loop around it.

An objective adds the gradient of its loss, *already divided by the size of the global batch*, to the parameters. The
loop then sums gradients over ranks. So k ranks take the same step as one process, however a batch is split.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from datasets.loading.order import GOLDEN_RATIO, splitmix64
from pipeline.config.schema import BackboneStage, JointStage, PredictorStage, RoutedStage, Stage
from pipeline.models.drnet import DRNet
from pipeline.models.norms import has_synchronized_norms, kept_statistics
from pipeline.training import distributed
from pipeline.training.mixing import Mixed, Mixing
from pipeline.training.optim import cost_target, temperature


def gumbel_noise(seed: int, epoch: int, indices_N: Tensor, num_resolutions: int) -> Tensor:
    """Return standard Gumbel noise (N, R), float32 on the CPU, for samples `indices_N` in an epoch."""
    with np.errstate(over="ignore"):
        key = splitmix64(splitmix64(np.uint64(seed % 2**64)) + np.uint64(epoch))
        sample_N1 = splitmix64(key + indices_N.cpu().numpy().astype(np.uint64) * GOLDEN_RATIO)[:, None]
        bits_NR = splitmix64(sample_N1 + np.arange(1, num_resolutions + 1, dtype=np.uint64) * GOLDEN_RATIO)
    # Take 53 random bits, shifted by half a step away from 0 and 1, so that both logarithms are finite.
    uniform_NR = ((bits_NR >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(-np.log(uniform_NR))).float()


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Return the seed of torch's generator (dropout) for one step, so that checkpoints need not store its state."""
    with np.errstate(over="ignore"):
        value = np.uint64(seed % 2**64)
        for part in (epoch, step, rank):
            value = splitmix64(value + GOLDEN_RATIO * np.uint64(part + 1))
    return int(value >> np.uint64(1))


def straight_through_choice(predictor_logits_NR: Tensor, gumbel_NR: Tensor, tau: float) -> Tensor:
    """Return one-hot choices (N, R) with the gradient of the relaxed choice (straight-through Gumbel-softmax).

    The forward value is h = one_hot(argmax_j(log p_j + g_j)); its gradient is that of softmax((log p + g) / tau).
    """
    perturbed_NR = functional.log_softmax(predictor_logits_NR.float(), dim=1) + gumbel_NR
    relaxed_NR = functional.softmax(perturbed_NR / tau, dim=1)
    hard_NR = functional.one_hot(perturbed_NR.argmax(dim=1), perturbed_NR.shape[1]).to(relaxed_NR.dtype)
    # In this order, (relaxed - relaxed) is exactly zero, so the forward value is exactly one-hot.
    return hard_NR + (relaxed_NR - relaxed_NR.detach())


def mixed_logits(choice_NR: Tensor, logits_NRK: Tensor) -> Tensor:
    """Return the network's output y = sum_j h_j y_j, (N, K)."""
    return torch.einsum("nr,nrk->nk", choice_NR, logits_NRK)


def summed_cross_entropy(logits_NK: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross entropy summed over the batch. The caller divides by the size of the global batch.

    Args:
        targets: classes (N,), or the probability of each class (N, K).
    """
    return functional.cross_entropy(logits_NK.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def summed_distillation(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Return KL(p_teacher || p_student), summed over the batch. The teacher gets no gradient."""
    log_student_NK = functional.log_softmax(student_NK.float(), dim=1)
    log_teacher_NK = functional.log_softmax(teacher_NK.detach().float(), dim=1)
    return functional.kl_div(log_student_NK, log_teacher_NK, reduction="sum", log_target=True)


def cost_penalty(local_cost: Tensor, others_cost: Tensor, costs_R: Tensor, alpha: float) -> Tensor:
    """Compute L_reg = max(0, (E[F] - alpha) / (C_max - C_min)), with E[F] the mean over the *global* batch.

    Args:
        local_cost: this rank's part of E[F], sum_n F_n / N_global, with gradient.
        others_cost: the other ranks' part of E[F], without gradient.
        costs_R: C_j, in GFLOPs or milliseconds.
        alpha: target in the same unit.
    """
    excess = (local_cost + others_cost - alpha) / (costs_R.max() - costs_R.min())
    return excess.clamp(min=0)


class Ensemble(nn.Module):
    """Weighted mean of the logits at R resolutions (Wang et al., "Resolution Switchable Networks", ECCV 2020).

    The weights are softmax(scores) and start equal. Learned weights minimize the ensemble's cross entropy, whose
    gradient reaches only the scores. The logits come from the students of the same step. This is the paper's
    multi-resolution ensemble distillation without losses between pairs of resolutions. The temperature is 1, as in the
    paper.

    Args:
        num_resolutions: R.
        learned: False keeps the weights equal.
    """

    def __init__(self, num_resolutions: int, *, learned: bool):
        super().__init__()
        self.scores_R = nn.Parameter(torch.zeros(num_resolutions), requires_grad=learned)

    def forward(self, logits_NRK: Tensor) -> Tensor:
        """Return the teacher's logits (N, K), with gradient for the scores only."""
        return torch.einsum("r,nrk->nk", self.scores_R.softmax(dim=0), logits_NRK.detach())


# Batch norm in training mode needs two values per channel, but one image at the smallest resolution may have only one.
MIN_IMAGES_FOR_STATISTICS: int = 2


Sums = dict[str, Tensor]
"""Sums of the reported values over a rank's images: loss, correct answers, choices, cost."""
LastPass = Callable[[], AbstractContextManager[None]]
"""The context of a backward pass after which no other pass changes the gradients of the parameters that it reaches."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global batch, on the model's device."""

    images: Mapping[int, Tensor]
    """Maps a side to images, uint8 (N, side, side, 3)."""
    labels_N: Tensor
    gumbel_NR: Tensor
    global_size: int
    """The number of images of this step on all ranks."""
    logits_NRK: Tensor | None = None
    """Stored logits of the frozen backbone, or None. With stored logits, `images` needs only the predictor's input."""
    epoch: float = 0.0
    """The finished epochs of the stage, for annealed values. A fraction counts the steps within an epoch."""
    step: int = 0
    """The finished steps of the stage."""
    num_slices: int = 1
    """The number of slices that the backbone trains on one after another, so that memory holds one at a time."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def slices(self) -> list[slice]:
        """Return the rows of each slice. Every rank has the same number; sizes differ by at most one and may be 0."""
        bounds = [len(self) * part // self.num_slices for part in range(self.num_slices + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(bounds)]

    def passes(self, last_pass: LastPass) -> Iterable[tuple[slice, LastPass]]:
        """Return the rows of each slice with its context: `last_pass` for the last slice, none for the others."""
        return zip(self.slices(), [*itertools.repeat(nullcontext, self.num_slices - 1), last_pass], strict=True)

    def part(self, rows: slice) -> StepBatch:
        """Return the images at these rows, as part of the same global batch."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return StepBatch(**{name: _rows_of(value, rows) for name, value in values.items()})


def _rows_of(value: Any, rows: slice) -> Any:
    if isinstance(value, Mapping):
        return {key: tensor[rows] for key, tensor in value.items()}
    return value[rows] if isinstance(value, Tensor) else value


class Objective(ABC):
    """Add a step's gradient to the parameters, and return the values to report.

    `own` holds what the stage trains besides the model. It belongs to the optimizer and to checkpoints, but not to the
    finished model. Most objectives own nothing.
    """

    own: nn.Module = nn.Module()

    def unfreeze(self) -> None:  # noqa: B027  most objectives freeze nothing
        """Make every parameter that the stage trains require a gradient. The next step freezes what it must."""

    @abstractmethod
    def __call__(self, batch: StepBatch, last_pass: LastPass = nullcontext) -> Sums: ...


def build_objective(
    model: DRNet, stage: Stage, costs_R: Tensor, precision: str = "float32", backward: str = "apart"
) -> Objective:
    """Build the objective of a stage, and freeze what the stage does not train.

    Args:
        costs_R: the backbone's cost at each resolution, in the unit of the stage's alpha, on the model's device.
        precision: float32, or bfloat16 to run forward passes under autocast.
        backward: training.backward, for the backbone stage.
    """
    forward = Forward(model, precision)
    model.requires_grad_(True)
    if isinstance(stage, BackboneStage):
        model.predictor.requires_grad_(False)
        return BackboneObjective(forward, stage, costs_R.device, together=backward == "together")
    correctness = isinstance(stage, PredictorStage) and stage.objective == "correctness"
    model.predictor.clear_offset(gives_probabilities=correctness)
    if isinstance(stage, PredictorStage):
        model.backbone.requires_grad_(False)
        return CorrectnessObjective(forward) if correctness else PredictorObjective(forward, stage, costs_R)
    assert isinstance(stage, JointStage)
    return JointObjective(forward, stage, costs_R)


class Forward:
    """The model's two forward passes in the run's precision. Logits are returned as float32.

    Batch norm runs in inference mode for fewer than MIN_IMAGES_FOR_STATISTICS images; gradients still flow. With
    synchronized batch norm the images of all ranks count, and all ranks must make the same passes in training mode.
    """

    def __init__(self, model: DRNet, precision: str):
        assert precision in ("float32", "bfloat16"), precision
        self.model, self.enabled = model, precision == "bfloat16"
        self.synchronized = has_synchronized_norms(model)

    def layer_by_layer(self, images: Mapping[int, Tensor], index: int, *, frozen_statistics: bool = False) -> Tensor:
        """Run `backbone` in training mode so that the backward pass goes layer by layer over all resolutions.

        Autograd orders the operations of a backward pass by their sequence numbers in the thread that ran them forward.
        In a separate thread, a layer has the same numbers at every resolution. So the gradients of the last layers are
        complete, and can be sent, as soon as the pass has reached these layers. A single process does not do this,
        because it sends nothing. Synchronized batch norms do not do it either, because their messages need a fixed
        order, which equal numbers do not give.
        """
        run = partial(self.backbone, images, index, training=True, frozen_statistics=frozen_statistics)
        device = images[self.model.resolutions[index]].device
        if distributed.world_size() == 1 or self.synchronized:
            return run()
        prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        with ThreadPoolExecutor(1, initializer=prepare) as thread:
            return thread.submit(run).result()

    def backbone(
        self, images: Mapping[int, Tensor], index: int, *, training: bool, frozen_statistics: bool = False
    ) -> Tensor:
        """Return logits (N, K) at resolution `index`, for images {side: uint8 (N, side, side, 3)}.

        Args:
            frozen_statistics: batch norm uses its running statistics, and does not update them, in training mode too.
        """
        side = self.model.resolutions[index]
        self.model.backbone.freeze_statistics(frozen_statistics)
        self.model.backbone.train(training and (frozen_statistics or self._has_statistics(images[side])))
        with torch.autocast(images[side].device.type, torch.bfloat16, enabled=self.enabled):
            return self.model.static_logits(images, index).float()

    @torch.no_grad()
    def frozen_backbone(self, images: Mapping[int, Tensor]) -> Tensor:
        """Return logits (N, R, K) at all resolutions, without gradient and with batch norm in inference mode."""
        indices = range(len(self.model.resolutions))
        return torch.stack([self.backbone(images, index, training=False) for index in indices], dim=1)

    def predictor(self, images: Mapping[int, Tensor]) -> Tensor:
        """Return the predictor's outputs (N, R), on which it is trained."""
        inputs = images[self.model.predictor_size]
        self.model.predictor.train(self._has_statistics(inputs))
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model.predictor.outputs(self.model.normalize(inputs)).float()

    def known_logits(self, part: StepBatch) -> Tensor:
        """Return the frozen backbone's logits (N, R, K), stored ones if the batch has them."""
        return self.frozen_backbone(part.images) if part.logits_NRK is None else part.logits_NRK

    def _has_statistics(self, images: Tensor) -> bool:
        """Return whether batch norm sees enough images to compute statistics."""
        count = len(images)
        if self.synchronized:
            count = int(distributed.sum_over_ranks(torch.tensor(count, device=images.device)))
        return count >= MIN_IMAGES_FOR_STATISTICS


def sandwich(num_resolutions: int, per_step: int | None, step: int) -> list[int]:
    """Return the indices of the resolutions that a step trains, ascending (sandwich rule; Yu and Huang, ICCV 2019).

    The largest and the smallest resolution are always included. Those in between take turns instead of being drawn at
    random, so that each is trained equally often and every rank knows them without communication.

    Args:
        per_step: number of resolutions in a step, at least 2; None trains all.
        step: finished steps of the stage.
    """
    if per_step is None or per_step >= num_resolutions:
        return list(range(num_resolutions))
    between, turns = num_resolutions - 2, per_step - 2
    return sorted({0, num_resolutions - 1, *(1 + (step * turns + turn) % between for turn in range(turns))})


class BackboneObjective(Objective):
    """The sum of the losses of a step's resolutions. Backward runs per slice and resolution, to save activation memory.

    With distillation, L = sum_j (L_ce(y_j) + weight * KL(p_teacher || p_j)). The teacher is the largest resolution,
    which does not learn from itself, or the ensemble (Wang et al., ECCV 2020); learned ensemble weights add
    L_ce(ensemble).

    In the first freeze_epochs epochs, only the classifier has a gradient, and batch norms keep their statistics. This
    depends on progress alone, so a resume needs no state. The first freeze_layers groups never have one.

    The communication overlaps with a step's last backward pass. So the last pass is that of the largest resolution,
    unless there is distillation, which runs the largest resolution first. `together` runs one pass for all resolutions,
    which overlaps more communication but keeps the activations of all.
    """

    def __init__(self, forward: Forward, stage: BackboneStage, device: torch.device, *, together: bool):
        self.forward, self.stage, self.together = forward, stage, together
        self.frozen = False
        self.fixed = forward.model.backbone.first_layers(stage.freeze_layers)
        self._freeze_layers()
        self.mixing = Mixing(stage) if stage.mixup_alpha or stage.cutmix_alpha else None
        self.ensemble: Ensemble | None = None
        if stage.distillation in ("mean", "learned"):
            num_resolutions = len(forward.model.resolutions)
            self.ensemble = Ensemble(num_resolutions, learned=stage.distillation == "learned").to(device)
            self.own = self.ensemble

    def __call__(self, batch: StepBatch, last_pass: LastPass = nullcontext) -> Sums:
        self._freeze(batch.epoch < self.stage.freeze_epochs)
        mixed: Mixed | None = None
        if self.mixing is not None:  # mix once for all slices, so that mixtures do not depend on slicing
            sides = self.forward.model.resolutions
            mixed = self.mixing({side: batch.images[side] for side in sides}, batch.labels_N)
            batch = replace(batch, images=mixed.images, labels_N=mixed.dominant_N)
        sums: Sums = {}
        for rows, ending in batch.passes(last_pass):
            _add(sums, self._train_on(batch.part(rows), mixed.part(rows) if mixed else None, ending))
        return sums

    def unfreeze(self) -> None:
        self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        """Train only the classifier if `frozen`, otherwise the whole backbone."""
        if frozen != self.frozen:
            backbone, self.frozen = self.forward.model.backbone, frozen
            backbone.requires_grad_(not frozen)
            for parameter in backbone.classifier_parameters():
                parameter.requires_grad_(True)
            self._freeze_layers()

    def _freeze_layers(self) -> None:
        """Freeze the first layers. The backward pass stops above them, which saves most of its time."""
        for parameter in self.fixed:
            parameter.requires_grad_(False)

    def _logits(self, images: Mapping[int, Tensor], index: int) -> Tensor:
        return self.forward.backbone(images, index, training=True, frozen_statistics=self.frozen)

    def _train_on(self, part: StepBatch, mixed: Mixed | None, last_pass: LastPass) -> Sums:
        """Run a slice forward and backward. `mixed` contains the slice's mixtures, if any."""
        sides = self.forward.model.resolutions
        sums: Sums = {"loss": torch.zeros((), device=part.labels_N.device)}
        losses: list[Tensor] = []
        teacher_NK: Tensor | None = None
        indices = sandwich(len(sides), self.stage.resolutions_per_step, part.step)
        smaller = indices[:0:-1]
        order = [*smaller, 0] if self.stage.distillation == "none" else [0, *smaller]
        logits_of: Callable[[int], Tensor] = partial(self._logits, part.images)
        if self.ensemble is not None or self.together:
            students = self._students(part.images, indices)
            logits_of = students.__getitem__
            if self.ensemble is not None:
                teacher_NK = self.ensemble(torch.stack([*students.values()], dim=1))
                sums["accuracy_ensemble"] = _correct(teacher_NK, part.labels_N)
        for index in order:
            logits_NK = logits_of(index)
            loss = self._cross_entropy(logits_NK, part, mixed)
            if teacher_NK is not None:
                loss = loss + self.stage.distillation_weight * summed_distillation(logits_NK, teacher_NK)
            elif self.stage.distillation == "largest":
                teacher_NK = logits_NK.detach()
            if self.together:
                losses.append(loss)
            else:
                sums["loss"] += _backward(loss, part, last_pass if index == order[-1] else nullcontext)
            if len(indices) == len(sides) or index in (0, len(sides) - 1):  # the others skip some steps
                sums[f"accuracy_{sides[index]}"] = _correct(logits_NK, part.labels_N)
        if self.together:
            sums["loss"] += _backward(torch.stack(losses).sum(), part, last_pass)
        if teacher_NK is not None and teacher_NK.requires_grad:  # this gradient reaches only the ensemble's scores
            sums["loss"] += _backward(self._cross_entropy(teacher_NK, part, mixed), part)
        return sums

    def _cross_entropy(self, logits_NK: Tensor, part: StepBatch, mixed: Mixed | None) -> Tensor:
        targets = part.labels_N if mixed is None else mixed.targets(logits_NK.shape[1])
        return summed_cross_entropy(logits_NK, targets, self.stage.label_smoothing)

    def _students(self, images: Mapping[int, Tensor], indices: Sequence[int]) -> dict[int, Tensor]:
        """Return logits (N, K) at the resolutions `indices`, largest first, before the first backward pass.

        With `together`, all resolutions keep their activations. Otherwise only the largest resolution keeps them, and
        its backward pass runs first. The others recompute theirs in their backward pass, after the largest's are freed;
        batch norm does not count that second pass. So the memory peak is that of the largest resolution alone, at the
        cost of one more forward pass of the smaller ones.
        """
        backbone = self.forward.model.backbone
        if self.together:
            return {
                index: self.forward.layer_by_layer(images, index, frozen_statistics=self.frozen) for index in indices
            }
        largest, *smaller = indices
        students = {
            index: checkpoint(
                self._logits,
                images,
                index,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), kept_statistics(backbone)),
            )
            for index in smaller
        }
        return {largest: self._logits(images, largest), **students}


class RoutedObjective(Objective):
    """The predictor's straight-through choices among the backbone's logits: L = L_ce + eta * L_reg.

    The backbone runs forward and backward slice by slice, while the gradient of the choices is collected. The predictor
    is small, so it runs forward and backward once on the rank's whole batch. So neither E[F] nor the predictor's batch
    norm depends on how the batch is sliced.
    """

    def __init__(self, forward: Forward, stage: RoutedStage, costs_R: Tensor):
        self.forward, self.stage, self.costs_R = forward, stage, costs_R
        self.unit = "milliseconds" if stage.alpha_gflops is None else "gflops"

    @abstractmethod
    def logits(self, part: StepBatch, chosen_N: Tensor) -> Tensor:
        """Return the backbone's logits (N, R, K) for a slice whose images chose the resolutions `chosen_N`."""

    def __call__(self, batch: StepBatch, last_pass: LastPass = nullcontext) -> Sums:
        tau, alpha = temperature(self.stage, batch.epoch), cost_target(self.stage, batch.epoch)
        choice_NR = straight_through_choice(self.forward.predictor(batch.images), batch.gumbel_NR, tau)
        # Detach the choices here, so that the predictor's backward pass runs once, at the end.
        cut_NR = choice_NR.detach().requires_grad_()
        sums: Sums = {}
        for rows, ending in batch.passes(last_pass):
            part, h_NR = batch.part(rows), cut_NR[rows]
            logits_NK = mixed_logits(h_NR, self.logits(part, h_NR.detach().argmax(dim=1)))
            loss = summed_cross_entropy(logits_NK, part.labels_N, self.stage.label_smoothing)
            _add(sums, {"loss": _backward(loss, part, ending), "accuracy_routed": _correct(logits_NK, part.labels_N)})
        cost_N = cut_NR @ self.costs_R
        local_cost = cost_N.sum() / batch.global_size
        others_cost = distributed.sum_over_ranks(local_cost) - local_cost.detach()
        penalty = self.stage.eta * cost_penalty(local_cost, others_cost, self.costs_R, alpha)
        penalty.backward()
        with last_pass():
            choice_NR.backward(cut_NR.grad)
        _add(sums, {"loss": penalty.detach() * len(batch), f"{self.unit}_backbone": cost_N.detach().sum()})
        return sums | {f"share_{index}": share for index, share in enumerate(cut_NR.detach().sum(dim=0))}


class PredictorObjective(RoutedObjective):
    """Train only the predictor, on a frozen backbone (batch norm in inference mode, no gradient) or stored logits."""

    def logits(self, part: StepBatch, chosen_N: Tensor) -> Tensor:
        return self.forward.known_logits(part)


class CorrectnessObjective(Objective):
    """Train the predictor to estimate the probability that each resolution is correct, on a frozen backbone.

    L = sum_j BCE(sigmoid(z_j), p_j), with p_j the probability that the backbone gives the true class at resolution j.
    """

    def __init__(self, forward: Forward):
        self.forward = forward

    def __call__(self, batch: StepBatch, last_pass: LastPass = nullcontext) -> Sums:
        logits_NRK = torch.cat([self.forward.known_logits(batch.part(rows)) for rows in batch.slices()])
        labels_NR1 = batch.labels_N[:, None, None].expand(-1, logits_NRK.shape[1], 1)
        targets_NR = logits_NRK.softmax(dim=2).gather(2, labels_NR1).squeeze(2)
        outputs_NR = self.forward.predictor(batch.images)
        loss = functional.binary_cross_entropy_with_logits(outputs_NR, targets_NR, reduction="sum")
        best_NR = functional.one_hot(outputs_NR.detach().argmax(dim=1), outputs_NR.shape[1]).float()
        routed_NK = mixed_logits(best_NR, logits_NRK)
        sums = {"loss": _backward(loss, batch, last_pass), "accuracy_routed": _correct(routed_NK, batch.labels_N)}
        return sums | {f"share_{index}": share for index, share in enumerate(best_NR.sum(dim=0))}


class JointObjective(RoutedObjective):
    """Train predictor and backbone together.

    With hard choices, the backbone's gradient flows only through the chosen resolution, and the gradient of the choice
    needs only the values at the others. So each image trains at its chosen resolution, in a sub-batch with the other
    images that chose it. At the other resolutions it runs without gradient and without updating batch norm statistics.

    The images that choose a resolution are not representative. Their statistics would make the resolution worse for all
    other images, and the predictor would learn to avoid it. So by default running statistics normalize the sub-batch
    too. They are not updated (`frozen`), or are first updated from the whole batch (`all`). `routed` uses and updates
    the sub-batch's own statistics, as the paper does.
    """

    def __init__(self, forward: Forward, stage: JointStage, costs_R: Tensor):
        super().__init__(forward, stage, costs_R)
        self.norm_statistics = stage.norm_statistics

    def logits(self, part: StepBatch, chosen_N: Tensor) -> Tensor:
        indices = range(len(self.costs_R))
        return torch.stack([self._logits_at(index, part, chosen_N == index) for index in indices], dim=1)

    def _logits_at(self, index: int, part: StepBatch, chosen_N: Tensor) -> Tensor:
        """Return logits (N, K) at one resolution, with gradient only for the images that chose it."""
        side = self.forward.model.resolutions[index]
        images = part.images[side]
        if self.norm_statistics == "all":  # this must come first, because the backward pass reads the statistics again
            with torch.no_grad():
                self.forward.backbone({side: images}, index, training=True)
        trained, valued = chosen_N.nonzero().squeeze(1), (~chosen_N).nonzero().squeeze(1)
        logits = []
        if len(valued):  # this must come before the pass that may update the running statistics
            with torch.no_grad():
                logits.append(self.forward.backbone({side: images[valued]}, index, training=False))
        frozen = self.norm_statistics != "routed"
        if len(trained) or not len(part) or (self.forward.synchronized and not frozen):
            sub_batch = {side: images[trained]}
            logits.append(self.forward.layer_by_layer(sub_batch, index, frozen_statistics=frozen))
        return torch.cat(logits)[torch.cat([valued, trained]).argsort()]


def _backward(loss: Tensor, part: StepBatch, last_pass: LastPass = nullcontext) -> Tensor:
    """Add the gradient of a slice's summed loss, divided by the size of the global batch. Return the summed loss."""
    with last_pass():
        (loss / part.global_size).backward()
    return loss.detach()


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def _correct(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    return (logits_NK.detach().argmax(dim=1) == labels_N).sum().float()
