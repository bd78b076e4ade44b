"""Rules that make one update of many: means, of adapters too, and rules that bear clients which may send anything."""

from strategies.combiners.bulyan import Bulyan
from strategies.combiners.clipping import CenteredClipping, NormBounding
from strategies.combiners.coordinates import Median, TrimmedMean
from strategies.combiners.fltrust import FLTrust
from strategies.combiners.geometric_median import GeometricMedian
from strategies.combiners.krum import Krum, MultiKrum
from strategies.combiners.lora_mean import LoraMean
from strategies.combiners.lora_partitioned import LoraPartitioned
from strategies.combiners.lora_residual import LoraFedEx, LoraStack
from strategies.combiners.lora_svd import LoraSvd
from strategies.combiners.lora_zero_pad import LoraZeroPad
from strategies.combiners.majority_vote import MajorityVote
from strategies.combiners.mean import Mean
from strategies.combiners.mixing import Bucketing, NearestNeighborMixing
from strategies.combiners.robust import Robust

__all__ = [
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "FLTrust",
    "GeometricMedian",
    "Krum",
    "LoraFedEx",
    "LoraMean",
    "LoraPartitioned",
    "LoraStack",
    "LoraSvd",
    "LoraZeroPad",
    "MajorityVote",
    "Mean",
    "Median",
    "MultiKrum",
    "NearestNeighborMixing",
    "NormBounding",
    "Robust",
    "TrimmedMean",
]
