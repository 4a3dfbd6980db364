"""Problems as prompts for reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence

from errors import UserError, folded
from text.chats.chat_template import Message, encode_chats
from text.chats.problems import Problem, Problems, is_generated, open_problems, read_problems
from text.order import block_shares, content_hash, mixed, scramble
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.tokenizer import Tokenizer


class PromptDataset:
    """Problems as prompts for a model that answers them itself: `problem(i)` is a function of (seed, i) alone.

    Several sources are mixed by weight, each going through its own epochs. `validation` are problems held out;
    `report` counts the rows that were read and skipped.
    """

    def __init__(
        self,
        sources: Sequence[Source | tuple[str, float]],
        tokenizer: Tokenizer,
        longest: int,
        seed: int = 0,
        system: str = "",
        on_error: str = "skip",
        val_fraction: float = 0.0,
        val_problems: int = 0,
    ) -> None:
        """Open sources: files, folders, Hub data sets or generators (see `problems`), each with its weight, or 1.

        Args:
            longest: tokens that a prompt may have; longer ones of a file are counted and left out.
            system: system prompt before every question; empty for none.
            val_problems: how many to hold out, over all sources: of a file at most the share `val_fraction`.
        Raises:
            UserError: a source that cannot be read or has no problem left.
        """
        self.tokenizer, self.longest, self.seed, self.system = tokenizer, longest, seed, system
        self.report, self.too_long = RowReport(), 0
        sources = [Source.of(source) for source in sources]
        self._shares = block_shares([source.weight or 1.0 for source in sources])
        self._sources: list[Problems] = []
        self._used = self._held = 0
        self.validation: list[Problem] = []
        for source in sources:
            if is_generated(source):
                problems = open_problems(source)
            else:
                train, held = map(self._fitting, read_problems(source, on_error, self.report, val_fraction))
                if not train:
                    raise UserError(
                        f"{source.path}: all prompts have more than {self.longest} tokens; raise --sequence_length or "
                        "lower --max_new_tokens"
                    )
                self._used, self._held = self._used + len(train), self._held + len(held)
                problems = Problems.listed(train, held)
            self._sources.append(problems)
            self.validation += problems.held_out(-(-val_problems // len(sources)))

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    @property
    def identity(self) -> str:
        """What the order of the problems depends on beside the seed."""
        sizes, shares = (":".join(map(str, values)) for values in (map(len, self._sources), self._shares))
        return f"{sizes} problems, shares {shares}"

    @property
    def content(self) -> str:
        """The same for the same problems of the same sources, those held out too."""
        return content_hash(source.content for source in self._sources)

    def problem(self, index: int, turn: int = 0) -> Problem:
        """Return problem `index`, counted from the start of training; another `turn` is another order of the data."""
        seed = scramble(self.seed, turn) if turn else self.seed
        source, number = mixed(index, self._shares, seed)
        return self._sources[source].problem(number, seed)

    def encode(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Return the token ids of each prompt, up to where the answer begins. Raises `UserError` for a long one."""
        encoded = encode_prompts(self.tokenizer, problems, self.system)
        for ids, problem in zip(encoded, problems, strict=True):
            if len(ids) > self.longest:
                raise UserError(
                    f"a prompt of {problem.kind} has {len(ids)} tokens, but {self.longest} is the most; "
                    "raise --sequence_length or lower --max_new_tokens"
                )
        return encoded

    def print_summary(self, use: str = "to train on") -> None:
        """Print what was read, on one screen. use: what the problems are for."""
        lines = self.report.lines() if self.report.rows else []
        if self.too_long:
            limit = f"{self.longest} tokens, which --sequence_length leaves beside a reply; raise it"
            lines.append(f"  {self.too_long} left out: longer than {limit}")
        if self.report.rows:
            fates = {use: self._used, "held out": self._held, "left out": self.too_long, **self.report.unused}
            lines.append(balance(self.report.rows, "rows", fates))
        measured = f"; {len(self.validation)} of those held out are measured on" if self.validation else ""
        print(folded("\n".join([*lines, f"{len(self)} problems an epoch{measured}"])))

    def _fitting(self, problems: list[Problem]) -> list[Problem]:
        encoded = encode_prompts(self.tokenizer, problems, self.system)
        fitting = [problem for problem, ids in zip(problems, encoded, strict=True) if len(ids) <= self.longest]
        self.too_long += len(problems) - len(fitting)
        return fitting


def encode_prompts(tokenizer: Tokenizer, problems: Sequence[Problem], system: str = "") -> list[list[int]]:
    """Return the token ids of each prompt, up to where the answer begins."""
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    asked = [[*before, {"role": "user", "content": problem.question}] for problem in problems]
    return [ids for ids, _ in encode_chats(tokenizer, asked, add_generation_prompt=True)]
