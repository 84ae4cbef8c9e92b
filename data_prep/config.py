"""What to prepare: the configuration of `python -m data_prep`, one class a section of the YAML file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config_file import ConfigError, Section, load_config
from .memory import least_worker_bytes
from .places import is_remote, lost_with_a_ray_package, place

MEBIBYTE = 1024**2
DEFAULT_WORK = ".work"


class CorpusSection(Section):
    """One named source of text."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="name of the corpus; enters the shuffle keys")
    paths: list[str] = Field(
        min_length=1,
        description="files, globs (** goes into folders), or folders (every .txt, .jsonl and .parquet below, also "
        "behind links; hidden names are left out), here or as URLs that fsspec knows (s3://bucket/folder)",
    )
    root: str | None = Field(
        default=None,
        description="folder that file names are taken relative to (they enter the shuffle keys); "
        "null: the folder in `paths` before the first wildcard",
    )
    format: Literal["auto", "txt", "jsonl", "parquet"] = Field(
        default="auto",
        description="txt: a record a line; jsonl: a JSON object a line; parquet: a record a row; auto: by suffix. "
        "From a folder only files with a suffix of the format are taken",
    )
    records: Literal["line", "paragraph"] = Field(
        default="line",
        description="txt: a record is a line, or the lines between two empty ones; other files of the corpus keep "
        "the records of their format",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how often a record is taken, after deduplication: 2 twice, 0.25 one of four, 1.5 once or twice "
        "(chosen by key; every copy has a place of its own in the shuffle)",
    )
    text_field: str = Field(
        default="text",
        min_length=1,
        description="jsonl and parquet: the field, or column, that holds the text",
    )

    @model_validator(mode="after")
    def _only_txt_has_paragraphs(self) -> CorpusSection:
        if self.records == "paragraph" and self.format in ("jsonl", "parquet"):
            raise ValueError(f"records: paragraph is for txt, and format is {self.format}; leave it out")
        return self


class CleaningSection(Section):
    """How the text of a record is cleaned, and which records are dropped (each for a counted reason)."""

    unicode: Literal["nfc", "nfkc", "none"] = Field(default="nfc", description="Unicode normalisation")
    strip_control: bool = Field(
        default=True,
        description="remove control, zero-width-space, bidi, byte-order marks (NUL and surrogates always go)",
    )
    collapse_whitespace: bool = Field(
        default=True,
        description="turn every run of whitespace, line ends included, into one space and strip the ends",
    )
    min_characters: int = Field(
        default=1, ge=1, description="shorter texts are dropped as too_short [characters]"
    )
    max_characters: int | None = Field(
        default=None, ge=1, description="longer texts are dropped as too_long [characters]; null: no limit"
    )
    min_letter_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="texts with a smaller share of letters (CJK and combining marks included) among their "
        "characters other than spaces are dropped as few_letters",
    )
    min_cjk_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="texts with a smaller share of Han characters, kana and hangul among their characters other than "
        "spaces are dropped as few_cjk",
    )
    functions: list[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]] = Field(
        default=[],
        description="your own functions as module:name, called in order before everything else with the raw text; "
        "each returns the text, or None to drop it (counted under its name). Importable where the workers run",
    )
    max_record_bytes: int = Field(
        default=16 * MEBIBYTE,
        ge=1024,
        description="larger raw records are quarantined as record_too_large [bytes]",
    )


class DeduplicationSection(Section):
    """Texts that occur more than once."""

    method: Literal["exact", "none"] = Field(
        default="none",
        description="exact: of records with the same clean text, also in different corpora, the one at the first "
        "place (corpus, file, record) stays, the others are dropped as duplicate",
    )


class QuarantineSection(Section):
    """How much may be unreadable before a run fails, in pass 1. Changes no byte of the output."""

    max_record_share: float = Field(
        default=0.01, ge=0, le=1, description="share of the records that may be quarantined"
    )
    max_file_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the files that may be cut short: damaged, a decompression bomb, changed during the run",
    )


class TrainSection(Section):
    """How to train the sentencepiece model on a keyed uniform sample of the records."""

    model: Literal["unigram", "bpe"] = Field(
        default="unigram", description="sentencepiece model type; bpe trains faster"
    )
    vocab_size: int = Field(
        default=50_000, ge=64, le=2**31, description="pieces, the 5 special ones included"
    )
    sample_bytes: int = Field(
        default=200_000_000,
        ge=1,
        description="cleaned text to train on [bytes]; the trainer needs about 30 times that in memory",
    )
    threads: int = Field(
        default=1, ge=1, description="trainer threads; part of the result, so fixed, never the core count"
    )
    character_coverage: float = Field(
        default=0.9995, gt=0, le=1, description="share of the characters that get a piece of their own"
    )
    seed_pieces: int | None = Field(
        default=None,
        ge=64,
        description="unigram: candidates to start from, more than vocab_size; null: 20 x vocab_size, but at "
        "most a million or, where that is more, 5 x vocab_size",
    )

    @model_validator(mode="after")
    def _candidates_suffice(self) -> TrainSection:
        if self.model == "unigram" and self.seed_pieces and self.seed_pieces <= self.vocab_size:
            raise ValueError(
                f"seed_pieces: {self.seed_pieces} candidates cannot give vocab_size={self.vocab_size} pieces; "
                "take several times vocab_size, or leave it out"
            )
        return self

    @property
    def seed_size(self) -> int:
        """Candidates that unigram training starts from."""
        return self.seed_pieces or max(5 * self.vocab_size, min(1_000_000, 20 * self.vocab_size))


class TokenizerSection(Section):
    """Train a sentencepiece model, or load one."""

    load: str | None = Field(
        default=None,
        description="sentencepiece .model file, or BERT vocab.txt, to use instead of training a model",
    )
    adopt: bool = Field(
        default=False,
        description="load somebody else's sentencepiece model: its pieces and scores with our special pieces in front "
        "(ids shift), without its own normalisation, dummy prefix and byte pieces",
    )
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _only_a_loaded_model_is_adopted(self) -> TokenizerSection:
        if self.adopt and not self.load:
            raise ValueError("adopt: true is for a model that is loaded; give load, or leave adopt out")
        return self


class WordsSection(Section):
    """Word starts, for whole-word masking."""

    segmenter: Literal["rjieba", "none"] = Field(
        default="rjieba", description="none: shards carry no word starts"
    )


class ShuffleSection(Section):
    """The order of the output."""

    algorithm: Literal["key", "stripe"] = Field(
        default="key",
        description="key: sort by a random key, exactly uniform; stripe: every group of 1,024 neighbours is dealt "
        "over the whole output, one to a stripe (stratified, NOT uniform; for comparison)",
    )


class ShardsSection(Section):
    """The layout of the output."""

    content: Literal["tokens", "text"] = Field(
        default="tokens",
        description="tokens: webdataset shards of ids; text: the cleaned texts, shuffled, a line each",
    )
    compress_text: bool = Field(default=True, description="content text: zstd frames of 2 MiB, or plain text")
    row_tokens: int = Field(default=512, ge=8, le=2**20, description="length of a row [tokens]")
    target_bytes: int = Field(
        default=256 * MEBIBYTE,
        ge=4096,
        description="token bytes of a shard before compression; sets the number of shards",
    )
    block_bytes: int = Field(
        default=192 * 1024,
        ge=1024,
        description="token bytes of a block, the unit of one read and one webdataset sample; at 192 KiB the headers "
        "of the tar are 2 percent of it",
    )
    validation_share: float = Field(
        default=0.005,
        ge=0,
        lt=1,
        description="share of the texts for validation, chosen by content: copies stay together",
    )
    zstd_level: int = Field(default=3, ge=1, le=19, description="compression level of the shards")


class ResourcesSection(Section):
    """What the machine may give. Nothing here changes a byte of the output."""

    workers: int | None = Field(
        default=None, ge=1, description="tasks at a time; null: every core (on Ray: with memory for one)"
    )
    worker_memory_bytes: int = Field(
        default=1024 * MEBIBYTE,
        ge=112 * MEBIBYTE,
        description="memory of a worker above what the idle program takes; larger means longer reads in pass 2",
    )
    memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="memory of all workers together, programs included: less than they, or training a tokenizer, "
        "need is refused, also where this machine has less; null: not checked",
    )
    min_read_bytes: int = Field(
        default=128 * 1024,
        ge=1,
        description="a read that the disk of work_dir does well; where pass 2 would read less at a time, a pass "
        "between is added (object storage and hard disks: 1 to 4 MiB)",
    )
    task_bytes: int | None = Field(
        default=None,
        ge=1,
        description="input of one task; null: between 64 MiB and 1 GiB by the size of the corpus",
    )
    lease_seconds: float = Field(
        default=30.0,
        gt=0,
        description="a run that shows no sign of life for so long may be followed by another one",
    )
    spill: Literal["auto", "none", "lz4", "zstd"] = Field(
        default="auto",
        description="compression of the intermediate files; auto: by what the disk of work_dir does in a probe",
    )
    log_seconds: float = Field(
        default=60.0, gt=0, description="seconds between progress lines when not on a terminal"
    )


class PrepareConfig(Section):
    """Everything `data_prep run` needs to know."""

    seed: int = Field(
        default=0, ge=0, lt=2**64, description="the order, the split and the samples follow from it"
    )
    output_dir: str = Field(
        description="where manifest.json, tokenizer/, train/ and validation/ go; seen by all nodes"
    )
    work_dir: str | None = Field(
        default=None,
        description="where a folder .sutrain-… for the intermediate files is made, and removed at the end; "
        "null: OUTPUT_DIR/.work",
    )
    corpora: list[CorpusSection] = Field(min_length=1)
    cleaning: CleaningSection = CleaningSection()
    deduplication: DeduplicationSection = DeduplicationSection()
    quarantine: QuarantineSection = QuarantineSection()
    tokenizer: TokenizerSection = TokenizerSection()
    words: WordsSection = WordsSection()
    shuffle: ShuffleSection = ShuffleSection()
    shards: ShardsSection = ShardsSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _corpora_have_names_of_their_own(self) -> PrepareConfig:
        names = [corpus.name for corpus in self.corpora]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"two corpora are called {double[0]!r}; each needs a name of its own")
        return self

    @model_validator(mode="after")
    def _the_largest_record_fits(self) -> PrepareConfig:
        least = least_worker_bytes(self.cleaning.max_record_bytes)
        if self.resources.worker_memory_bytes < least:
            raise ValueError(
                f"resources.worker_memory_bytes: {self.resources.worker_memory_bytes:,} is too little for records of "
                f"cleaning.max_record_bytes={self.cleaning.max_record_bytes:,}; give at least {least:,}, or lower the "
                "limit of a record"
            )
        return self

    @model_validator(mode="after")
    def _far_output_has_a_near_work_dir(self) -> PrepareConfig:
        if is_remote(self.work_dir or "") or (is_remote(self.output_dir) and not self.work_dir):
            reason = (
                f"{self.work_dir} is a URL" if self.work_dir else f"required with the URL {self.output_dir}"
            )
            raise ValueError(f"work_dir: {reason}; give a folder that every node sees as a file system")
        return self

    @model_validator(mode="after")
    def _a_text_is_a_line(self) -> PrepareConfig:
        if self.shards.content == "text" and not self.cleaning.collapse_whitespace:
            for number, corpus in enumerate(self.corpora):
                if corpus.format != "txt" or corpus.records != "line":
                    raise ValueError(
                        f"corpora.{number}.format: with shards.content=text a text must be one line; take "
                        "cleaning.collapse_whitespace=true, or format: txt with records: line"
                    )
            if self.cleaning.functions:
                raise ValueError(
                    "cleaning.functions: may return line ends, and with shards.content=text a text must be one line; "
                    "take cleaning.collapse_whitespace=true, which comes after them"
                )
        return self

    @property
    def output_path(self) -> Path:
        """The output folder; for an output_dir that is a URL, the folder of what stays here of it."""
        if is_remote(self.output_dir):
            name = hashlib.sha256(self.output_dir.encode()).hexdigest()[:16]
            return place(self.work_dir or "") / f".output-{name}"
        return place(self.output_dir)

    @property
    def work_base(self) -> Path:
        """The folder in which a run makes a folder of its own for intermediate files."""
        if self.work_dir:
            return place(self.work_dir)
        return self.output_path / DEFAULT_WORK

    def content(self) -> dict[str, Any]:
        """The part of the configuration that decides the content of the output (a loaded tokenizer by its
        hash elsewhere, input files by the table of inputs).
        """
        tree = self.model_dump(mode="json", exclude={"output_dir", "work_dir", "resources", "quarantine"})
        for corpus in tree["corpora"]:
            del corpus["paths"], corpus["root"]
        del tree["tokenizer"]["load"]
        if self.tokenizer.load:
            del tree["tokenizer"]["train"]
        return tree


def load(path: str | Path, overrides: list[str]) -> PrepareConfig:
    """Read and check a configuration. Raises ConfigError with every mistake, one a line."""
    config = load_config(PrepareConfig, path, overrides)
    problems = lost_with_a_ray_package(_paths(config), os.getcwd())
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def _paths(config: PrepareConfig) -> dict[str, str | None]:
    """Every path or URL of a configuration by its key."""
    paths = {
        "output_dir": config.output_dir,
        "work_dir": config.work_dir,
        "tokenizer.load": config.tokenizer.load,
    }
    for number, corpus in enumerate(config.corpora):
        paths[f"corpora.{number}.root"] = corpus.root
        paths |= {f"corpora.{number}.paths.{i}": path for i, path in enumerate(corpus.paths)}
    return paths
