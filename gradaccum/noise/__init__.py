"""Is this batch size worth it: the gradient noise scale, and what it says about a batch size."""

from gradaccum.noise.advice import Advice, advise
from gradaccum.noise.branch import Branch, branch
from gradaccum.noise.scale import Noise, NoiseScale

__all__ = ["Advice", "Branch", "Noise", "NoiseScale", "advise", "branch"]
