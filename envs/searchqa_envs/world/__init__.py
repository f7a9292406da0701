"""Generated worlds: small encyclopedias about made-up things, with questions whose way to the answer is known."""

from searchqa_envs.world.generate import GENERATOR_VERSION, World
from searchqa_envs.world.names import SYLLABLES, split_of
from searchqa_envs.world.schema import PRESETS, RELATIONS, Relation, WorldPreset, get_preset
from searchqa_envs.world.source import WorldRetriever, WorldSource

__all__ = [
    "GENERATOR_VERSION",
    "PRESETS",
    "RELATIONS",
    "SYLLABLES",
    "Relation",
    "World",
    "WorldPreset",
    "WorldRetriever",
    "WorldSource",
    "get_preset",
    "split_of",
]
