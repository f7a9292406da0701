"""The seven published question sets: names, splits, sizes, where they are on the hub, licences and citations."""

from __future__ import annotations

from dataclasses import dataclass, field

from searchqa_envs.errors import ConfigurationError

SPLITS = ("train", "dev", "test")
"""The splits a set can have. ``all`` (every row) and ``extra`` (questions without passages) are asked for in the same way."""


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a data set repository on the hub.

    ``folder`` is the part of the path that is dropped when the files are laid down in the set's own folder.
    """

    repo: str
    patterns: tuple[str, ...]
    folder: str = ""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What is published about a set. ``sizes`` are the rows of the splits as :attr:`hub` has them."""

    name: str
    title: str
    sizes: dict[str, int]
    hub: HubFiles
    licence: str
    citation: str
    has_contexts: bool
    other_hubs: dict[str, HubFiles] = field(default_factory=dict)

    @property
    def default_split(self) -> str:
        """``train``, or the only split the set has."""
        return "train" if "train" in self.sizes else next(iter(self.sizes))


FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"


def _flashrag(name: str) -> HubFiles:
    return HubFiles(FLASHRAG, (f"{name}/*.jsonl",), folder=name)


_INFOS = (
    DatasetInfo(
        name="hotpotqa",
        title="HotpotQA",
        sizes={"train": 90_447, "dev": 7_405},
        hub=HubFiles("hotpotqa/hotpot_qa", ("distractor/*.parquet",)),
        licence="CC BY-SA 4.0",
        citation="Yang et al., HotpotQA, EMNLP 2018, arXiv:1809.09600",
        has_contexts=True,
        other_hubs={"flashrag": _flashrag("hotpotqa")},
    ),
    DatasetInfo(
        name="2wikimultihopqa",
        title="2WikiMultiHopQA",
        sizes={"train": 15_000, "dev": 12_576},
        hub=_flashrag("2wikimultihopqa"),
        licence="Apache-2.0",
        citation="Ho et al., Constructing A Multi-hop QA Dataset, COLING 2020, arXiv:2011.01060",
        has_contexts=True,
    ),
    DatasetInfo(
        name="musique",
        title="MuSiQue",
        sizes={"train": 19_938, "dev": 2_417},
        hub=HubFiles("dgslibisey/MuSiQue", ("musique_ans_v1.0_*.jsonl",)),  # MuSiQue's own files; FlashRAG's have no paragraphs
        licence="CC BY 4.0",
        citation="Trivedi et al., MuSiQue, TACL 2022, arXiv:2108.00573",
        has_contexts=True,
        other_hubs={"flashrag": _flashrag("musique")},
    ),
    DatasetInfo(
        name="bamboogle",
        title="Bamboogle",
        sizes={"test": 125},
        hub=_flashrag("bamboogle"),
        licence="not established",
        citation="Press et al., Measuring and Narrowing the Compositionality Gap, Findings of EMNLP 2023, arXiv:2210.03350",
        has_contexts=False,
    ),
    DatasetInfo(
        name="nq",
        title="Natural Questions (open)",
        sizes={"train": 79_168, "dev": 8_757, "test": 3_610},
        hub=_flashrag("nq"),
        licence="CC BY-SA 3.0",
        citation="Kwiatkowski et al., Natural Questions, TACL 2019; Lee et al., ACL 2019, arXiv:1906.00300",
        has_contexts=False,
    ),
    DatasetInfo(
        name="triviaqa",
        title="TriviaQA",
        sizes={"train": 78_785, "dev": 8_837, "test": 11_313},
        hub=_flashrag("triviaqa"),
        licence="Apache-2.0",
        citation="Joshi et al., TriviaQA, ACL 2017, arXiv:1705.03551",
        has_contexts=False,
    ),
    DatasetInfo(
        name="popqa",
        title="PopQA",
        sizes={"test": 14_267},
        hub=_flashrag("popqa"),
        licence="MIT",
        citation="Mallen et al., When Not to Trust Language Models, ACL 2023, arXiv:2212.10511",
        has_contexts=False,
    ),
)

DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _INFOS}
"""The seven sets by their Hydra names."""

COLLECTIONS: dict[str, HubFiles] = {
    "nq_hotpotqa_train": HubFiles("PeterJinGo/nq_hotpotqa_train", ("*.parquet",)),
    "zerosearch": HubFiles("sunhaonlp/ZeroSearch_dataset", ("*.parquet",)),
    "wiki18": HubFiles("PeterJinGo/wiki-18-corpus", ("*.jsonl.gz", "*.jsonl")),
}
"""Other things ``searchqa data download`` can fetch: the rows of Search-R1 and of ZeroSearch, Search-R1's Wikipedia corpus (tens of gigabytes unpacked)."""

QUESTION_COLLECTIONS = ("nq_hotpotqa_train", "zerosearch")
"""Those of :data:`COLLECTIONS` that are questions: several sets merged, with a split ``train`` and a split ``test``."""


def dataset_info(name: str) -> DatasetInfo:
    """The entry of a set; raises :class:`ConfigurationError` for a name that is none of the seven."""
    try:
        return DATASETS[name]
    except KeyError:
        raise ConfigurationError(
            f"a data set is one of {', '.join(DATASETS)}; got {name!r}. "
            "For your own files use the name 'custom' (SearchQA-Custom-v0) with questions=<path>."
        ) from None
