"""The section `data`: what is read, and how it becomes rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from glm_jax.config.fields import Section, definitions, field, section

Format = Literal["text", "lines", "jsonl", "jsonl.zst", "json", "parquet"]
RecordFormat = Literal["", "jsonl", "jsonl.zst", "json", "parquet"]
NORMALISATIONS = ("nfc", "nfkc", "newlines")

# The kinds of rows: three ways to blank a text, and prompts with answers.
OBJECTIVES = ("mask", "gmask", "smask", "instruction")

# Weights by name over samples seen, linear between the knots: ((0, {"en": 1.0}), (500_000, {"en": 1.0, "zh": 1.0})).
History = tuple[tuple[int, Mapping[str, float]], ...]


@dataclass(frozen=True)
class Source(Section):
    """An entry of `data.sources`; `path` or `sample` must be set."""

    path: str = field("", path=True, doc="a file, a directory or a glob; used instead of the sample")
    sample: str = field("", doc="the name of a sample corpus, see glm_jax/data/corpora/samples.py")
    format: Format = field("text", doc="text: a blank line ends a document, lines: each line is one, json: an array")
    normalise: str = field("", doc=r"any of nfc, nfkc (Unicode's forms) and newlines (\r\n to \n), separated by commas")
    language: str = field("en", doc="language of the text")
    weight: float = field(1.0, at_least=0, doc="share of rows, relative to the other sources'")
    field: str = field(  # last, because it shadows the function
        "text", doc='the field or column that holds the text; "title, meta.body" joins two, one of them nested'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in filter(None, map(str.strip, self.normalise.split(","))):
            if option not in NORMALISATIONS:
                raise ValueError(f"normalise has {option!r}, it takes any of {', '.join(NORMALISATIONS)}")


@dataclass(frozen=True)
class InstructionSet(Section):
    """An entry of `data.instructions`; `path` or `sample` must be set."""

    path: str = field("", path=True, doc="a file, a directory or a glob of records; used instead of the sample")
    sample: str = field("", doc="the name of an example set, see glm_jax/data/instructions/samples.py")
    format: RecordFormat = field("", doc="format of the files, json: an array; empty: as each file's name ends")
    dataset: str = field(
        "", doc="which of GLM-130B's data sets it is, see glm_jax/data/instructions/registry.py; empty: none of them"
    )
    templates: str = field(
        "", path=True, doc="PromptSource's templates.yaml or .jinja files, or with `dataset` the folder of all its "
        "templates; empty: records are pairs such as `prompt` and `answer`, or chats, see docs/texts.md",
    )  # fmt: skip
    cap: int = field(
        0,
        at_least=0,
        doc="maximum number of samples; 0: as many as GLM-130B used of `dataset`, or all without `dataset`",
    )
    score_only: bool = field(
        False, doc="train on none of its records, and score the held-out ones: a task that training does not show"
    )
    weight: float = field(
        0.0, at_least=0, doc="share of instruction rows, relative to the others'; 0: its number of samples to train on"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_only and self.weight:
            raise ValueError("score_only trains on none of its records: leave out weight, or set score_only to False")


@dataclass(frozen=True)
class TokenizerConfig(Section):
    """The section `data.tokenizer`."""

    vocab_size: int = field(8000, at_least=1, doc="pieces to train, including special tokens")
    path: str = field(
        "",
        path=True,
        role="operational",  # a run is held to the tokenizer's content, wherever its file is
        doc="read this instead of training one: a tokenizer.model of ours, the official ice_text.model or "
        "cog-pretrain.model, a tokenizer.json, a vocab.txt, or a vocab.json with its merges.txt beside it",
    )
    pinned: bool = field(False, doc="ice_text.model as in 2022: newlines, tabs and runs of spaces are lost")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pinned and not self.path:
            raise ValueError("pinned is a reading of ice_text.model: give its path, or set pinned to False")


@dataclass(frozen=True)
class BlankOptions(Section):
    """How blanks are drawn and rows are cut: the part of `data.blanks` that draws depend on; hashable.

    The defaults follow the paper's text; what only its code did is off.
    """

    mask_ratio: float = field(
        0.15, above=0, at_most=0.5, doc="[MASK] spans are drawn until they hold int(mask_ratio * n) of n tokens"
    )
    mean_span: float = field(
        3.0, above=0, doc="mean of the Poisson distribution of span lengths, kept to 1..longest_span"
    )
    longest_span: int = field(39, at_least=1, doc="tokens")
    single_span_prob: float = field(
        0.0, at_least=0, at_most=1, doc="probability that a [MASK] sample has one span (GLM-130B: 0.02)"
    )
    short_seq_prob: float = field(
        0.0, at_least=0, at_most=1,
        doc="probability that a [MASK] segment holds two shorter samples, cut at a uniform place (GLM-130B: 0.02; it "
        "dropped the second, as cut_targets does)",
    )  # fmt: skip
    shortest_seq: int = field(
        1, at_least=1, doc="tokens that the first of these two keeps at least, with cut_targets (GLM-130B: 32)"
    )
    gmask_min_ratio: float = field(
        0.2,
        at_least=0,
        at_most=1,
        doc="the length of a [gMASK] target is uniform from this share of the text to all of it",
    )
    gmask_eop: bool = field(
        True,
        doc="a [gMASK] target at the end of the text ends with eop (GLM-130B's and the original GLM's never did); one "
        "inside the text always does",
    )
    gmask_infill_prob: float = field(
        0.0,
        at_least=0,
        at_most=1,
        doc="probability that a [gMASK] blank is anywhere, not at the end (original GLM: 0.5)",
    )
    smask_ratio: float = field(
        0.15, above=0, at_most=0.5, doc="sentences are blanked until they hold this share of the text"
    )
    block_mask_prob: float = field(
        0.0,
        at_least=0,
        at_most=1,
        doc="probability that a [MASK] target input becomes block_mask_token (original GLM: 0.1)",
    )
    block_mask_token: int = field(-1, at_least=-1, doc="the id of dBLOCK; -1: none")
    mask_segments: int = field(1, at_least=1, doc="[MASK] samples that share a row (GLM-130B: 4)")
    gmask_segments: int = field(1, at_least=1, doc="[gMASK] samples that share a row")
    smask_segments: int = field(1, at_least=1, doc="[sMASK] samples that share a row")
    instruction_segments: int = field(
        4, at_least=1, doc="instruction samples that share a row, each with an equal share of its places"
    )
    instruction_blank: Literal["mask", "gmask"] = field(
        "mask", doc="the blank for an answer. mask: as in GLM-130B's training; gmask: as a prompt without a blank asks"
    )
    whole_documents: bool = field(False, doc="pack each row with as many whole documents as fit")
    causal_context: bool = field(
        False, doc="an ablation, for sweeps alone: the tokens of a context see only what is before them, as targets do"
    )
    cut_targets: bool = field(
        False, doc="the released model's quirk: 500 tokens into 512 places, [MASK] targets that do not fit are cut"
    )
    replacement: bool = field(False, doc="the released model's quirk: windows drawn with replacement")
    # True: all target tokens have their blank's position in stream 0, and 1, 2, ... in stream 1. False: one stream, in
    # which [gMASK] and instruction targets continue counting. Follows from model.position, so it is not a key.
    two_streams: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_mask_prob > 0 and self.block_mask_token < 0:
            raise ValueError("block_mask_prob is set: give the id of dBLOCK as block_mask_token")
        if self.whole_documents and (self.cut_targets or self.replacement):
            raise ValueError("whole_documents does not go with cut_targets or replacement: turn one of them off")

    def segments(self, objective: str) -> int:
        """Return the number of samples that share a row of `objective`."""
        return getattr(self, f"{objective}_segments")


@dataclass(frozen=True)
class Blanks(BlankOptions):
    """The section `data.blanks`: shares of rows, and how blanks are drawn."""

    mask: float = field(0.3, at_least=0, doc="share of rows with [MASK] spans (paper, section 2.2)")
    gmask: float = field(0.7, at_least=0, doc="share of rows with a [gMASK] suffix")
    smask: float = field(0.0, at_least=0, doc="share of rows with [sMASK] sentences")
    instruction: float = field(0.0, at_least=0, doc="share of rows with prompts and answers, from data.instructions")
    history: History = field(
        (), at_least=0, example=(0, {"mask": 1.0}), doc="instead of these shares, their history over samples"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask + self.gmask + self.smask + self.instruction == 0:
            raise ValueError("mask, gmask, smask and instruction are all 0: give at least one a share")

    def shares(self) -> dict[str, float]:
        """Return the share of each objective that has one."""
        return {kind: getattr(self, kind) for kind in OBJECTIVES if getattr(self, kind) > 0}

    def objectives(self) -> Mapping[str, float] | History:
        """Return the history of the objectives' shares, or the shares if it is constant."""
        return self.history or self.shares()

    def options(self, two_streams: bool) -> BlankOptions:
        """Return the options that draws depend on; `two_streams`: whether model.position is learned_2d."""
        shared = {one.name: getattr(self, one.name) for one in definitions(BlankOptions)}
        return BlankOptions(**shared, two_streams=two_streams)


@dataclass(frozen=True)
class Data(Section):
    """The section `data`."""

    cache: str = field(
        "",
        path=True,
        role="operational",
        doc="folder for fetched text, tokenizers and shards; empty: the user's cache folder",
    )
    sources: Mapping[str, Source] = section(dict[str, Source], doc="corpora by name")
    seed: int = field(
        -1, at_least=-1, at_most=2**63 - 1, doc="seed of the order of rows and of their blanks; -1: the run's seed"
    )
    seq_length: int = field(256, at_least=16, role="frozen", doc="tokens of a row, context and targets together")
    heldout: float = field(
        0.05, at_least=0, below=1, doc="share of documents and records kept for evaluation, chosen by hash"
    )
    near_duplicates: float = field(
        0.8, at_least=0, below=1, doc="documents this similar (Jaccard) or more count as one; 0 drops exact copies only"
    )
    tokenizer: TokenizerConfig = section(TokenizerConfig, role="frozen")
    temperature: float = field(
        0.0, at_least=0, doc="above 0: multiply weights by tokens ** (1 / temperature); 1 draws sources by size"
    )
    weights: History = field(
        (),
        at_least=0,
        example=(0, {"name": 1.0}),
        doc="history over samples of the weights of sources and instruction sets; a knot names all sources or none, "
        "and what it leaves out has the weight of its entry",
    )
    instructions: Mapping[str, InstructionSet] = section(dict[str, InstructionSet], doc="prompts with answers, by name")
    blanks: Blanks = section(Blanks)

    def __post_init__(self) -> None:
        super().__post_init__()
        for samples, weights in self.weights:
            if (named := self.sources.keys() & weights) and (missing := sorted(self.sources.keys() - weights)):
                raise ValueError(
                    f"weights at {samples} samples name {', '.join(sorted(named))} and not {', '.join(missing)}: name "
                    "all sources, with 0 for those to leave out, or none"
                )
