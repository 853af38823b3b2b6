"""The ABSA suite: polarity of an aspect in 19 domains of products (EasyCL's ABSACL)."""

from dataclasses import dataclass

from configs.base_config import BaseConfig
from configs.task_files import suite_paths

_A = ["ApexAD2600Progressive", "CanonG3", "CanonPowerShotSD500", "CanonS100", "Computer"]
_B = ["CreativeLabsNomadJukeboxZenXtra40GB", "DiaperChamp"]
_C = ["HitachiRouter", "LinksysRouter", "MicroMP3"]
_D = ["NikonCoolpix4300", "Nokia6600"]
_E = ["Nokia6610", "Norton", "Router", "Speaker", "ipod"]
_F = ["laptop", "rest"]
ORDERS = {
    "order1": [*_A, *_B, *_C, *_D, *_E, *_F],
    "order2": [*_D, *_E, *_F, *_A, *_B, *_C],
    "order3": [*_D, *_F, *_A, *_E, *_B, *_C],
}


@dataclass
class AbsaConfig(BaseConfig):
    """118 to 1,000 training rows a task; each is a choice of two or three polarities."""

    task_orders = ORDERS
    task_order = ORDERS["order1"]
    data_paths = suite_paths("absa", ORDERS["order1"])
    task_judges = [f"{task}=choice" for task in ORDERS["order1"]]
    max_seq_len = 512
    eval_samples_per_task = 0  # accuracy as papers give it: on the whole test file
