"""IRCoT: retrieval and chain of thought take turns. The original, whose answer a separate reader gives, and FlashRAG's loop, which has no reader.

Paper: "Interleaving Retrieval with Chain-of-Thought Reasoning for Knowledge-Intensive Multi-Step Questions" (arXiv 2212.10509). Code followed:
StonyBrookNLP/ircot at 68f617e (``commaqa/inference/ircot.py``, ``participant_qa.py``, ``prompt_reader.py``, ``base_configs/ircot_qa_codex_hotpotqa.jsonnet``)
and RUC-NLPIR/FlashRAG (``flashrag/pipeline/active_pipeline.py``, ``flashrag/generator/generator.py``, ``flashrag/utils/pred_parse.py``; MIT licence),
of which instruction and demonstration are quoted.

How ours differs from both: a search is a turn in the environment, so the retriever and how many passages one search gives are the environment's
(there: BM25 and 6, dense and 5), and no more searches are made than leave a turn to answer in. A query that is empty is not searched for.

From the original:

- A sentence ends where a few rules say so, there where spaCy's model does; see :func:`first_sentence`.
- The length of the prompt is counted in characters, there in tokens of GPT-2.
- The demonstrations are three short ones of ours, there up to 20 training questions of the set that is evaluated; ``demonstrations`` takes its files.
- With ``instruction`` the reader that reasons is told to; there, a test of the wrong variable tells it only to answer.

From FlashRAG:

- Nothing is retrieved with the last thought, because nothing would read it.
- Blanks at both ends of a thought are dropped, and the answer's full stop.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from searchqa_agents.baselines.base import Baseline
from searchqa_agents.scripted import Ask, Info, Reply, Script, Task
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers.types import Passage

Steps = Generator[str | Ask, Any, None]

ANSWER = re.compile(r".* answer is:? (.*)\.?")
"""``answer_extractor_regex`` of the original's configurations: what ends the chain, and where the reader's answer stands."""
REASON_INSTRUCTION = "Answer the following question by reasoning step-by-step.\n"
ANSWER_INSTRUCTION = "Answer the following question.\n"
"""The two lines that the original puts before a question for Flan-T5, and not for Codex (``prompt_generator/common.py``)."""

DEMONSTRATIONS = """\
Wikipedia Title: Osterby Light
Osterby Light is a lighthouse on the island of Hamnsk\u00e4r. It was built in 1871 to plans by Karin Wessel and was automated in 1968.

Wikipedia Title: Karin Wessel
Karin Wessel (1829-1902) was an engineer who drew eleven lighthouses. She was born in Tolvik, the daughter of a sailmaker.

Wikipedia Title: Tolvik Chess Club
Tolvik Chess Club is one of the oldest chess clubs of its country. Its hall burnt down in 1911 and was rebuilt in brick.

Q: In which town was the engineer who planned Osterby Light born?
A: Osterby Light was built to plans by Karin Wessel. Karin Wessel was born in Tolvik. So the answer is: Tolvik.


Wikipedia Title: Brimfold
Brimfold is a village in the valley of the Ase, known for its covered bridge. At the last count it had 2,140 inhabitants.

Wikipedia Title: Covered bridge
A covered bridge is a bridge of timber with a roof, which keeps the weather from the beams.

Wikipedia Title: Marrow Hill
Marrow Hill is a village on the southern slope of the hill of that name. It has 890 inhabitants, a school and a cider press.

Q: Which village has more inhabitants, Marrow Hill or Brimfold?
A: Marrow Hill has 890 inhabitants. Brimfold has 2,140 inhabitants. Therefore, Brimfold has more. So the answer is: Brimfold.


Wikipedia Title: The Salt Ledger
The Salt Ledger is a novel by Odile Farron about a family of merchants. It won the Lantern Prize in 1987.

Wikipedia Title: Piers Hallam
Piers Hallam is a composer of chamber music. He played the viola before he turned to composing.

Wikipedia Title: Odile Farron
Odile Farron is a novelist and translator. Before her first book she taught geography for nine years.

Q: Are Piers Hallam and the author of The Salt Ledger both composers?
A: Piers Hallam is a composer. The Salt Ledger is a novel by Odile Farron. Odile Farron is a novelist and translator. So the answer is: no.
"""
"""Our demonstrations, on made-up places and people, in the form of the original's prompt files."""

FLASHRAG_INSTRUCTION = (
    "You serve as an intelligent assistant, adept at facilitating users through complex, multi-hop reasoning across multiple documents. "
    "This task is illustrated through demonstrations, each consisting of a document set paired with a relevant question and its multi-hop "
    "reasoning thoughts. Your task is to generate one thought for current step, DON'T generate the whole thoughts at once! If you reach what "
    'you believe to be the final step, start with "So the answer is:".'
)
"""``IRCOT_INSTRUCTION`` of FlashRAG, to the letter."""
FLASHRAG_DEMONSTRATION = (
    "Wikipedia Title: Kurram Garhi\nKurram Garhi is a small village located near the city of Bannu, which is the part of Khyber Pakhtunkhwa "
    "province of Pakistan. Its population is approximately 35000. Barren hills are near this village. This village is on the border of Kurram "
    "Agency. Other nearby villages are Peppal, Surwangi and Amandi Kala.\n\n"
    "Wikipedia Title: 2001\u201302 UEFA Champions League second group stage\nEight winners and eight runners- up from the first group stage were "
    "drawn into four groups of four teams, each containing two group winners and two runners- up. Teams from the same country or from the same "
    "first round group could not be drawn together. The top two teams in each group advanced to the quarter- finals.\n\n"
    "Wikipedia Title: Satellite tournament\nA satellite tournament is either a minor tournament or event on a competitive sporting tour or one "
    "of a group of such tournaments that form a series played in the same country or region.\n\n"
    "Wikipedia Title: Trojkrsti\nTrojkrsti is a village in Municipality of Prilep, Republic of Macedonia.\n\n"
    "Wikipedia Title: Telephone numbers in Ascension Island\nCountry Code:+ 247< br> International Call Prefix: 00 Ascension Island does not "
    "share the same country code( +290) with the rest of St Helena.\n\n"
    "Question: Are both Kurram Garhi and Trojkrsti located in the same country?\n"
    "Thought: Kurram Garhi is located in the country of Pakistan. Trojkrsti is located in the country of Republic of Macedonia. Thus, they are "
    "not in the same country. So the answer is: no."
)
"""``IRCOT_EXAMPLE`` of FlashRAG, to the letter: its one demonstration."""
FLASHRAG_MARK = "So the answer is:"


@dataclass(frozen=True)
class IRCoT:
    """The original. Values are those of ``base_configs/ircot_qa_codex_hotpotqa.jsonnet`` unless said otherwise. Published with greedy decoding."""

    max_sentences: int = 10
    """the chain ends after so many sentences (``max_num_sentences``)"""
    max_paragraphs: int = 15
    """so many paragraphs are kept, the first ones found (``global_max_num_paras``)"""
    paragraph_words: int = 350
    """a paragraph is shown up to this word (``max_para_num_words``)"""
    longest_paragraph: int = 600
    """a paragraph of more words is not kept at all (``RetrieveAndResetParagraphsParticipant``)"""
    reader: Literal["cot", "direct"] = "cot"
    """the reader reasons and then answers, or answers at once (``rc_qa_type``; Flan-T5's configurations: direct)"""
    instruction: bool = False
    """whether a line before the question says what to do (Flan-T5's configurations: true)"""
    demonstrations: str | None = None
    """a file of demonstrations as the original's ``prompts/*/*_context_cot_qa_*.txt``; null: ours"""
    max_tokens: int = 300
    """longest generation (``GPT3Generator``; Flan-T5's configurations: 200)"""
    prompt_characters: int = 30_800
    """demonstrations are left out, the first ones first, until the prompt is no longer (8000 tokens less ``max_tokens``, of 4 characters each)"""

    def __post_init__(self) -> None:
        for name in ("max_sentences", "max_paragraphs", "paragraph_words", "longest_paragraph", "max_tokens", "prompt_characters"):
            _check_positive("ircot", name, getattr(self, name))
        if self.reader not in ("cot", "direct"):
            raise ConfigurationError(f"The reader of ircot is cot or direct; got {self.reader!r}.")


@dataclass(frozen=True)
class IRCoTFlashRAG:
    """FlashRAG's loop. Values are those of ``IRCOTPipeline`` and ``examples/methods/my_config.yaml``. Published with greedy decoding."""

    max_iter: int = 2
    """most thoughts (``IRCOTPipeline``: 2; ``examples/methods/run_exp.py``, with which its results were made: 5)"""
    demonstrations: str | None = None
    """a file whose text takes the place of FlashRAG's one demonstration; null: that one"""
    max_tokens: int = 32
    """longest thought (``generation_params``)"""

    def __post_init__(self) -> None:
        for name in ("max_iter", "max_tokens"):
            _check_positive("ircot_flashrag", name, getattr(self, name))


class Demonstration(NamedTuple):
    """One worked question: its paragraphs as text, and the chain of thought that ends in the answer."""

    paragraphs: str
    question: str
    chain: str


def ircot(config: IRCoT) -> Script:
    """Retrieve, reason for one sentence, retrieve with it, ..., then let the reader answer from all paragraphs."""
    demonstrations = read_demonstrations(DEMONSTRATIONS if config.demonstrations is None else _text_of(config.demonstrations))

    def script(task: Task) -> Steps:
        question = task.question.question
        paragraphs: list[Passage] = []
        sentences: list[str] = []
        searches = task.max_turns - 1
        while searches > 0 and len(sentences) < config.max_sentences:
            query = next_query(question, sentences)
            if query:
                info: Info = yield task.segment("search", query, thought="".join(sentences[-1:]))
                accumulate(paragraphs, info["turn_record"].passages, config.max_paragraphs, config.longest_paragraph)
                searches -= 1
            reply: Reply = yield asked(config, demonstrations, paragraphs, question, sentences)
            sentences.append(first_sentence(reply.text))
            if not sentences[-1] or ANSWER.match(sentences[-1]):
                break
        # the reader is not told the chain: it begins its own, from the paragraphs
        reply = yield asked(config, demonstrations, paragraphs, question, reads=True)
        chain = [*sentences[-1:], reply.text.strip()] if config.reader == "cot" else sentences[-1:]
        yield task.segment("answer", read_answer(reply.text, config.reader), thought=" ".join(chain))

    return script


def ircot_flashrag(config: IRCoTFlashRAG) -> Script:
    """Retrieve, think, retrieve with the thought, ..., until a thought says the answer."""
    demonstration = FLASHRAG_DEMONSTRATION if config.demonstrations is None else _text_of(config.demonstrations)
    head = f"{FLASHRAG_INSTRUCTION}\n\n{demonstration.strip()}\n\n\n\n"

    def script(task: Task) -> Steps:
        question = query = task.question.question
        found: dict[str, tuple[float, str]] = {}  # score and text, by id
        shown: list[str] = []
        ascending: list[str] = []
        thoughts: list[str] = []
        searches = task.max_turns - 1
        for step in range(max(1, min(config.max_iter, searches))):
            if query and searches > 0:
                info: Info = yield task.segment("search", query, thought="".join(thoughts[-1:]))
                record = info["turn_record"]
                for passage, score in zip(record.passages, record.scores, strict=True):
                    best = max(score, found[passage.id][0]) if passage.id in found else score
                    found[passage.id] = (best, f"Wikipedia Title: {passage.title}\n{passage.text}\n\n")
                ascending = [text for _, text in sorted(found.values(), key=lambda scored: scored[0])]
                # the best document stands next to the question; but those of the question alone stay as they were found, the best first
                shown = ascending if step > 0 else [text for _, text in found.values()]
            prompt = f"{head}{''.join(shown)}Question: {question}\nThought: {' '.join(thoughts)}".rstrip()
            reply: Reply = yield Ask(
                (("user", prompt),),
                config.max_tokens,
                stop=(".", "\n"),
                plain=True,
                documents=tuple(ascending),
            )
            query = f"{reply.text}{'.' if reply.stop == '.' else ''}".strip()
            thoughts.append(query)
            if FLASHRAG_MARK in query:
                break
        chain = " ".join(thoughts)
        answer = chain.split(FLASHRAG_MARK)[1] if FLASHRAG_MARK in chain else chain
        yield task.segment("answer", answer.strip().removesuffix("."), thought=thoughts[-1])

    return script


BASELINES = (
    Baseline(
        "ircot",
        "one sentence of reasoning and one search in turn, then a separate reader",
        IRCoT,
        ircot,
        turns=lambda config, set_name: config.max_sentences + 1,
    ),
    Baseline(
        "ircot_flashrag",
        "one thought and one search in turn, as in FlashRAG, without a reader",
        IRCoTFlashRAG,
        ircot_flashrag,
        turns=lambda config, set_name: config.max_iter + 1,
    ),
)


# -- what is searched for and kept ---------------------------------------------------------------------------------------------------------

QUESTION_WORDS = frozenset({"who", "what", "when", "where", "why", "which", "how", "does", "is"})
_CONCLUSIONS = ("thus ", "thus,", "so ", "so,", "that is,", "therefore", "hence")
_SUM = re.compile(r"\d [+-] \d+(?:,+\d+)*(?:,*\.\d+)? = \d")


def next_query(question: str, sentences: Sequence[str]) -> str:
    """The last sentence that says something to look up, before there is one the question; without words that ask. It may be empty."""
    factual = [sentence for sentence in sentences if not is_conclusion(sentence)]
    query = factual[-1].strip() if factual else ""
    return " ".join(word for word in (query or question).split(" ") if word.strip().lower() not in QUESTION_WORDS).strip()


def is_conclusion(sentence: str) -> bool:
    """Whether a sentence draws a conclusion ("Thus, ...") or does a sum ("1962 + 3 = 1965"): there is nothing in it to look up."""
    return sentence.lower().startswith(_CONCLUSIONS) or _SUM.search(sentence) is not None


def accumulate(paragraphs: list[Passage], found: Sequence[Passage], most: int, longest: int) -> None:
    """Append to ``paragraphs`` what is new in ``found``, up to ``most``; what has more than ``longest`` words is left out."""
    for passage in found:
        if len(paragraphs) < most and len(passage.text.split(" ")) <= longest and not is_repeat(paragraphs, passage):
            paragraphs.append(passage)


def is_repeat(paragraphs: Sequence[Passage], passage: Passage, threshold: float = 90.0) -> bool:
    """Whether title and text are there already, or nearly so in one paragraph (``is_para_closely_matching``)."""
    if passage.title in {kept.title for kept in paragraphs} and passage.text in {kept.text for kept in paragraphs}:
        return True
    return any(
        similarity(kept.title, passage.title) >= threshold and similarity(kept.text, passage.text) >= threshold for kept in paragraphs
    )


def similarity(a: str, b: str) -> float:
    """Twice the length of the longest common subsequence over the lengths together, in percent: ``rapidfuzz.fuzz.ratio``.

    The subsequence is counted by rows of bits (Hyyr\u00f6, "Bit-parallel LCS-length computation revisited", 2004), a row being one integer.
    """
    length = len(a) + len(b)
    if a == b:
        return 100.0
    places: dict[str, int] = {}
    for place, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << place
    row = full = (1 << len(a)) - 1
    for character in b:
        common = row & places.get(character, 0)
        row = ((row + common) | (row - common)) & full
    return 200.0 * (len(a) - row.bit_count()) / length


# -- sentences and answers -----------------------------------------------------------------------------------------------------------------

_STOP = re.compile(r"(?<![.!?])[.!?]++[\"'\u201d\u2019)\]]*+(?=\s+(\S)|\s*$)|\n")
_TITLES = frozenset({"Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Lt", "Col", "Gen", "Capt", "Sgt", "Rev", "Mt", "Ft", "vs", "Vol", "Op"})
_BEFORE_FIGURES = frozenset({"No", "Jan", "Feb", "Aug", "Sept", "Oct", "Nov", "Dec"})
_INITIALS = re.compile(r"\W*(?:[^\W\d_]\.)*[^\W\d_]")
_BEGINNINGS = re.compile(r"\s+(?:So|Thus|Therefore|Hence|The|He|She|It|They|This|That|These|In|Both)\b")


def first_sentence(text: str) -> str:
    """The first sentence of a text, stripped; empty for a blank text.

    It ends at ``.!?`` before a blank and anything but a small letter, or at a line break. A full stop behind a title ("Dr."), "No." or a month before a
    digit, or initials ("J. R. R.", "U.S.") ends it only where a word follows that often begins sentences.
    """
    text = text.strip()
    for stop in _STOP.finditer(text):
        following = stop[1]
        if following is None or stop[0] == "\n":
            return text[: stop.end()].strip()
        if following.islower():
            continue
        before = (text[max(0, stop.start() - 20) : stop.start()].split() or [""])[-1]
        abbreviated = before in _TITLES or _INITIALS.fullmatch(before) is not None or (before in _BEFORE_FIGURES and following.isdigit())
        if not (abbreviated and stop[0] == ".") or (before not in _TITLES and _BEGINNINGS.match(text, stop.end())):
            return text[: stop.end()]
    return text


def read_answer(written: str, reader: Literal["cot", "direct"]) -> str:
    """The answer in what the reader wrote: all of it, or behind the last "answer is"; where a chain has none, all of its first line."""
    written = written.strip()
    if reader == "direct":
        return written
    found = ANSWER.match(written)
    return (found[1] if found is not None else written.partition("\n")[0]).removesuffix(".")


# -- prompts -------------------------------------------------------------------------------------------------------------------------------


def read_demonstrations(text: str) -> tuple[Demonstration, ...]:
    """The demonstrations of a prompt file: paragraphs, ``Q:`` and ``A:`` lines; two blank lines between them; ``# METADATA:`` lines are left out.

    Raises ``ConfigurationError`` where one has no ``Q:`` and ``A:``, or no "answer is" in its chain.
    """
    demonstrations = []
    for block in re.split(r"\n{3,}", re.sub(r"^# METADATA:.*$", "", text, flags=re.MULTILINE).strip()):
        paragraphs, q, rest = f"\n{block}".rpartition("\nQ: ")
        question, a, chain = rest.partition("\nA: ")
        if not (q and a and ANSWER.match(chain)):
            raise ConfigurationError(
                "A demonstration of ircot is paragraphs, a line 'Q: question' and a line 'A: chain of thought. So the answer is: answer.', "
                f"with two blank lines before the next one; got {block[:200]!r}."
            )
        question = question.removeprefix(REASON_INSTRUCTION).removeprefix(ANSWER_INSTRUCTION)
        demonstrations.append(Demonstration(paragraphs.strip(), question.strip(), chain.strip()))
    return tuple(demonstrations)


def paragraph_text(passage: Passage, words: int) -> str:
    """A paragraph as it is shown (``para_to_text``)."""
    text = " ".join(passage.text.split(" ")[:words]).strip()
    return text if text.startswith("Wikipedia Title: ") else f"Wikipedia Title: {passage.title}\n{text}"


def asked(
    config: IRCoT,
    demonstrations: Sequence[Demonstration],
    paragraphs: Sequence[Passage],
    question: str,
    sentences: Sequence[str] = (),
    *,
    reads: bool = False,
) -> Ask:
    """What the model is asked: to go on with the chain by a sentence, or as the reader.

    Both have the same form: demonstrations, the paragraphs in the order they were found, the question, and what is written so far.
    """
    answers_at_once = reads and config.reader == "direct"
    instruction = (ANSWER_INSTRUCTION if answers_at_once else REASON_INSTRUCTION) if config.instruction else ""

    def example(paragraphs: str, question: str, written: str) -> str:
        return f"{paragraphs}\n\nQ: {instruction}{question}\nA: {written}".strip()

    examples = [
        example(given.paragraphs, given.question, read_answer(given.chain, "cot") if answers_at_once else given.chain)
        for given in demonstrations
    ]
    shown = [paragraph_text(passage, config.paragraph_words) for passage in paragraphs]
    prompt = fitted(examples, example("\n\n".join(shown), question, " ".join(sentences)), config.prompt_characters)
    parts = [*[given.paragraphs for given in demonstrations], *shown]
    return Ask(
        (("user", prompt),),
        config.max_tokens,
        stop=("\n",),
        plain=True,
        documents=tuple(part for part in parts if part in prompt),
    )


def fitted(examples: Sequence[str], last: str, longest: int) -> str:
    """``last`` behind as many of the later ``examples`` as fit into ``longest`` characters; one that is too long by itself loses its first lines."""
    for first in range(len(examples) + 1):
        prompt = "\n\n\n".join([*examples[first:], last])
        if len(prompt) <= longest:
            return prompt
    end = last[-longest:]
    return end.partition("\n")[2] or end


# -- configuration -------------------------------------------------------------------------------------------------------------------------


def _check_positive(method: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} of {method} must be an integer of at least 1; got {value!r}.")


def _text_of(file: str) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"There is no file of demonstrations {path}. Leave demonstrations null for the ones that come with the package."
        )
    return path.read_text(encoding="utf-8")
