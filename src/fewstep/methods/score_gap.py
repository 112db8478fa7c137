"""Papers that are a choice of options of the score-gap game (``families/matching.py``)."""

from __future__ import annotations

from ..adapters import LoraOptions
from ..part import variant
from ..path import NoiseSampler
from ..registry import Paper, method
from .families.matching import BacktrackOptions, Matching, MatchingOptions
from .families.score_gap import GanOptions

BELOW = NoiseSampler(kind="karras", high=0.8)
UNIFORM = NoiseSampler(kind="uniform", low=0.02, high=0.98)

SIMOptions = variant(MatchingOptions, "SIMOptions", gap="fisher", critic_turns=1, levels=BELOW)
SiDOptions = variant(
    MatchingOptions, "SiDOptions", gap="fisher", fisher_a=1.2, fisher_c=0.0, critic_turns=1, levels=BELOW
)
UniInstructOptions = variant(
    MatchingOptions,
    "UniInstructOptions",
    gap="fisher",
    fisher_a=0.5,
    fisher_c=0.0,
    divergence="forward_kl",
    ratio_gradient="exact",
    critic_turns=1,
    levels=BELOW,
    gan=GanOptions(student=0.01, critic=1.0),
)
FDistillOptions = variant(MatchingOptions, "FDistillOptions", divergence="jensen_shannon", gan=GanOptions())
SwiftBrushOptions = variant(
    MatchingOptions,
    "SwiftBrushOptions",
    critic_turns=1,
    levels=UNIFORM,
    critic_levels=NoiseSampler(kind="uniform"),
    critic_weight="snr",
    match_weight="noise",
    guidance=4.5,
    guide_critic=True,
    critic_lora=LoraOptions(rank=64, alpha=108, targets="all"),
)
DisBackOptions = variant(MatchingOptions, "DisBackOptions", backtrack=BacktrackOptions())
TDMOptions = variant(
    MatchingOptions, "TDMOptions", critic_turns=1, steps=4, stop="next", levels=NoiseSampler(kind="uniform", high=0.99)
)
PhasedDMDOptions = variant(
    MatchingOptions, "PhasedDMDOptions", steps=4, phases=2, levels=UNIFORM, critic_levels=UNIFORM
)
IKLOptions = variant(MatchingOptions, "IKLOptions", critic_turns=1, match_weight="none", levels=UNIFORM)


@method(
    "sim",
    Paper("2410.16794", "One-Step Diffusion Distillation through Score Implicit Matching", "SIM"),
    level="small",
)
class SIM(Matching):
    """Score implicit matching: descend a robust distance between the scores of student and teacher."""

    Options = SIMOptions


@method(
    "sid",
    Paper("2404.04057", "Score identity Distillation: Exponentially Fast Distillation of Diffusion Models", "SiD"),
    level="small",
)
class SiD(Matching):
    """Score identity distillation: the squared distance of scores, more than its exact gradient's share of one term."""

    Options = SiDOptions


@method(
    "uni_instruct",
    Paper("2505.20755", "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence", "Uni-Instruct"),
    level="small",
)
class UniInstruct(Matching):
    """The distance of scores weighed by the density ratio, with its whole gradient: an f-divergence of clean laws."""

    Options = UniInstructOptions


@method(
    "f_distill",
    Paper("2502.15681", "One-step Diffusion Models with f-Divergence Distribution Matching", "f-distill"),
    level="small",
)
class FDistill(Matching):
    """DMD2 with each row's gap weighed by ``h(r)`` of another divergence; the ratio r is the adversary's."""

    Options = FDistillOptions


@method(
    "swiftbrush",
    Paper("2312.05239", "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
          "SwiftBrush"),
    level="small",
)  # fmt: skip
class SwiftBrush(Matching):
    """Variational score distillation from prompts alone: teacher and LoRA critic guided alike, no images."""

    Options = SwiftBrushOptions


@method(
    "tdm",
    Paper("2503.06674", "Learning Few-Step Diffusion Models by Trajectory Distribution Matching", "TDM"),
    level="exact",
)
class TDM(Matching):
    """Trajectory distribution matching: each of a few deterministic steps ends in the teacher's law at its level."""

    Options = TDMOptions


@method(
    "disback",
    Paper("2408.15991", "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
          "DisBack"),
    level="small",
)  # fmt: skip
class DisBack(Matching):
    """Distribution backtracking: the way from the student's law to the teacher's is recorded, then walked back."""

    Options = DisBackOptions


@method(
    "phased_dmd",
    Paper("2510.27684", "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within "
          "Subintervals", "PhasedDMD"),
    level="exact",
)  # fmt: skip
class PhasedDMD(Matching):
    """Several networks share the steps: each brings the law at its last noise level to the teacher's, then the next."""

    Options = PhasedDMDOptions


@method(
    "ikl",
    Paper("2305.18455", "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion "
          "Models", "Diff-Instruct"),
    Paper("2406.05551", "Autoregressive Diffusion Transformer for Text-to-Speech Synthesis", "ARDiT"),
    level="exact",
)  # fmt: skip
class IKL(Matching):
    """Integral KL: the divergence of noised laws, over all levels; with ``blocks`` of each block given its past."""

    Options = IKLOptions
