"""Runs are compared on what they have in common, whatever their length and stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import entry, write_run

from errors import UserError
from eval.compare import main
from eval.compared_run import open_runs
from eval.comparison import draw, markdown
from eval.scores import Score
from training.run.log import read_metrics


def write_scores(
    folder: Path, items: int = 10, content: str = "", data: str = "x", **values: tuple[float, float, float]
) -> Path:
    """Suites with one accuracy each: (value, low, high). content: left out as in older files when empty."""
    folder.mkdir(parents=True, exist_ok=True)
    suites = {}
    for name, (value, low, high) in values.items():
        whole, others = Score("all", "acc", value, low, high, 0.25, items), ("mean of subjects", "law")
        scores = [vars(one) for one in (whole, *(Score(name, "acc", 0.1, items=2) for name in others))]
        facts = {"name": name, "settings": {"data": data}, "items": items, "cut": 0, "seconds": 1.0}
        facts |= {"content": content} if content else {}
        suites[name] = {**facts, "scores": scores}
    (folder / "scores.json").write_text(json.dumps({"ckpt": "x", "suites": suites}), encoding="utf8")
    return folder


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """A long run and a short one of next tokens, and one of preferences; two of them were measured."""
    long = write_run(tmp_path / "a" / "pretrain", *(entry(n, loss=9 - n, max_vio=[0.1, 0.5 * n]) for n in range(6)))
    texts = entry(0, loss=9.0, val_bits_per_byte=3.0), entry(2, loss=5.0, val_bits_per_byte=2.0)
    pairs = entry(1, loss=0.69, accuracy=0.5, margin=0.0), entry(3, loss=0.2, accuracy=1.0, margin=2.0)
    short, pairs = write_run(tmp_path / "b", *texts), write_run(tmp_path / "c", *pairs)
    write_scores(long / "eval" / "final", exam=(0.3, 0.2, 0.4), sums=(0.9, 0.85, 0.95))
    write_scores(short / "eval" / "final", exam=(0.35, 0.25, 0.45), sums=(0.5, 0.4, 0.6))
    return [str(long), str(short), str(pairs)]


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were drawn, not rendered, and open until the test is over."""
    from matplotlib import figure, pyplot

    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    monkeypatch.setattr(figure.Figure, "savefig", lambda *_, **__: None)
    yield figures
    for one in figures:
        close(one)


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the page's tables by their first ones, of several rows the first."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("|"):
            first, *rest = [cell.strip() for cell in line.split("|")[1:-1]]
            found.setdefault(first, rest)
    return found


def test_the_table_has_what_each_run_came_to(runs):
    page = markdown(open_runs(runs))
    found = rows(page)
    assert found["at the end of training"] == ["a/pretrain", "b", "c"]
    assert found["stage"] == ["next token", "next token", "preferences"]
    assert found["steps"] == ["5", "2", "3"] and found["tokens"] == ["5,000", "2,000", "3,000"]
    assert found["loss of the last logged step"] == ["4.0000", "5.0000", "0.2000"] and "not of one unit" in page
    assert found["held-out bits per byte (not known to be the same text)"] == ["–", "2.0000", "–"]
    assert found["MaxVio of the last logged step, worst layer"] == ["2.50", "–", "–"] and "KL" not in page


def test_scores_stand_side_by_side_and_those_that_differ_are_marked(runs):
    found = rows(markdown(open_runs(runs)))
    assert found["exam"] == ["all", "acc", "25.0%", "30.0% (20.0% to 40.0%)", "35.0% (25.0% to 45.0%)", "–"]
    assert found["sums"][3:] == ["90.0% (85.0% to 95.0%)", "50.0% (40.0% to 60.0%) *", "–"]
    assert "law" not in str(found)  # groups stay in each run's own page


def test_the_same_items_elsewhere_are_compared_and_other_items_are_not(runs, tmp_path):
    ours = write_scores(tmp_path / "ours", content="a1", exam=(0.3, 0.2, 0.4))
    moved = write_scores(tmp_path / "moved", content="a1", data="y", exam=(0.5, 0.45, 0.6))
    changed = write_scores(tmp_path / "changed", content="b2", exam=(0.9, 0.8, 1.0))
    # Older files do not know their content: other items, and the same number of items of other data.
    more = write_scores(tmp_path / "more", items=20, exam=(0.9, 0.8, 1.0))
    other_data = write_scores(tmp_path / "other_data", data="y", exam=(0.9, 0.8, 1.0))
    page = markdown(open_runs([str(ours), str(moved)]))
    assert rows(page)["exam"][3:] == ["30.0% (20.0% to 40.0%)", "50.0% (45.0% to 60.0%) *"] and "differ" not in page
    for one, other in ((str(ours), str(changed)), (runs[0], str(more)), (runs[0], str(other_data))):
        page = markdown(open_runs([one, other]))
        assert "exam: settings or items differ between the runs; its numbers are not to be compared." in page
        assert rows(page)["exam"][3:] == ["30.0% (20.0% to 40.0%)", "–"] and "sums: settings" not in page
        assert rows(page)["exam [2]"][3:] == ["–", "90.0% (80.0% to 100.0%)"]


def held(step: int, bits: float, name: str) -> dict:
    return entry(step, loss=5.0, val_bits_per_byte=bits, **({"held_out": {"text": name}} if name else {}))


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """Two runs on one held-out text, one on another, and an older one that names none."""
    names = {"a": "book.csv 01", "b": "book.csv 01", "c": "chats.jsonl 02", "d": ""}
    runs = [write_run(tmp_path / run, held(1, 3.0, name), held(2, 2.0, name)) for run, name in names.items()]
    return [str(run) for run in runs]


def test_bits_of_different_texts_stand_in_different_rows_and_panels(texts, tmp_path, drawn):
    found = rows(markdown(open_runs(texts)))
    assert found["held-out bits per byte: book.csv 01"] == ["2.0000", "2.0000", "–", "–"]
    assert found["held-out bits per byte: chats.jsonl 02"] == ["–", "–", "2.0000", "–"]
    assert found["held-out bits per byte (not known to be the same text)"] == ["–", "–", "–", "2.0000"]
    assert "held-out bits per byte" not in found
    draw(open_runs(texts), tmp_path / "c.png", "tokens")
    panels = {axis.get_title(): len(axis.lines) for axis in drawn[0].axes if "held-out" in axis.get_title()}
    unknown = "held-out text (not known to be the same text)"
    assert panels == {"held-out text: book.csv 01": 2, "held-out text: chats.jsonl 02": 1, unknown: 1}


def test_pairs_preferred_and_problems_solved_are_not_in_one_row(tmp_path):
    pairs = write_run(tmp_path / "p", entry(1, loss=0.5, accuracy=0.6, margin=0.1, val_accuracy=0.7, val_margin=0.2))
    problems = write_run(tmp_path / "q", entry(1, loss=0.0, reward=0.4, val_accuracy=0.9))
    found = rows(markdown(open_runs([str(pairs), str(problems)])))
    assert found["held-out pairs preferred (not known to be the same pairs)"] == ["70.0%", "–"]
    assert found["held-out reward margin (not known to be the same pairs)"] == ["0.200", "–"]
    assert found["held-out accuracy (not known to be the same problems)"] == ["–", "90.0%"]


def test_curves_of_all_lengths_are_drawn_and_losses_of_stages_apart(runs, tmp_path, drawn):
    draw(open_runs(runs), tmp_path / "c.png", "tokens")
    panels = {axis.get_title(): axis for axis in drawn[0].axes if axis.axison}
    long, short = panels["training loss: next token"].lines
    assert list(long.get_xdata()) == [1000, 2000, 3000, 4000, 5000] and list(long.get_ydata()) == [8, 7, 6, 5, 4]
    assert list(short.get_xdata()) == [2000] and short.get_marker() == "o"  # a single point would not be seen as a line
    assert [list(line.get_ydata()) for line in panels["training loss: preferences"].lines] == [[0.69, 0.2]]
    assert {line.get_color() for line in panels["learning rate"].lines} == {"C0", "C1", "C2"}
    scores = panels["scores (black: 95%, red: chance)"]
    assert [0.2, 0.4] in [list(line.get_xdata()) for line in scores.lines]  # an interval
    assert sorted(bar.get_width() for bar in scores.patches) == [0.3, 0.35, 0.5, 0.9]  # of the whole alone
    assert [label.get_text() for label in scores.get_yticklabels()] == ["exam acc", "sums acc"]
    assert "rewards" not in panels
    draw(open_runs(runs[:2]), tmp_path / "c.png", "seconds")
    (loss, *_) = (axis for axis in drawn[1].axes if axis.get_title() == "training loss")
    assert list(loss.lines[0].get_xdata()) == [0.5, 1, 1.5, 2, 2.5] and loss.get_xlabel() == "seconds of training"


def test_a_checkpoint_stands_for_its_run_and_brings_its_own_scores(runs):
    (Path(runs[0]) / "step-3").mkdir()
    write_scores(Path(runs[0]) / "eval" / "step-3", exam=(0.1, 0.0, 0.2))
    step, whole = open_runs([f"{runs[0]}/step-3", runs[0]])
    assert step.entries == whole.entries and list(step.suites) == ["exam"] and list(whole.suites) == ["exam", "sums"]


def test_the_script_writes_a_page_and_a_picture(runs, pretrained, tmp_path, run):
    done = run(main, *runs[:2], pretrained, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf8")
    assert page in done.out and (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    name = read_metrics(pretrained / "metrics.jsonl")[-1]["held_out"]["text"]
    assert f"held-out bits per byte: {name}" in rows(page)


def test_a_watched_run_is_drawn_again_when_it_has_logged_more_until_ctrl_c(runs, tmp_path, run, monkeypatch):
    drawn, slept = [], []
    begun = write_run(tmp_path / "begun")

    def log_more() -> None:
        with open(begun / "metrics.jsonl", "a", encoding="utf8") as file:
            file.write(json.dumps(entry(7, loss=2.0)) + "\n")

    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile = iter([lambda: None, log_more, lambda: None, interrupt])
    monkeypatch.setattr("eval.compare.time.sleep", lambda seconds: slept.append(seconds) or next(meanwhile)())
    monkeypatch.setattr("eval.compare.draw", lambda *given: drawn.append(given) or given[1].write(b"picture"))
    done = run(main, "--watch", begun, runs[1], "--every", 3, "--x", "step", "--out", tmp_path / "out")
    assert done.code == 0 and not done.err and slept == [3.0] * 4
    assert [[opened.last("step") for opened in given[0]] for given in drawn] == [[None, 2], [7, 2]]
    assert {given[2] for given in drawn} == {"step"}
    assert "steps: begun 0, b 2\n" in done.out and "steps: begun 7, b 2\n" in done.out
    assert (tmp_path / "out" / "comparison.png").read_bytes() == b"picture"
    assert "| 2.0000 |" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf8")


def test_one_run_may_be_watched_and_another_folder_may_not(runs, tmp_path, run, monkeypatch):
    monkeypatch.setattr("eval.compare.time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    done = run(main, "--watch", runs[1], "--out", tmp_path / "out")
    assert done.code == 0 and (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    done = run(main, "--watch", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.code == 2 and "nowhere: neither metrics.jsonl" in done.err
    done = run(main, "--watch", runs[1], "--every", 0)
    assert done.code == 2 and "--every 0: give a number of seconds" in done.err


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["a", "empty"], r"empty: neither metrics\.jsonl nor scores\.json in it; name a run folder"),
        (["a", "nowhere"], r"nowhere: neither metrics\.jsonl"),
        (["a"], "two runs or more"),
        (["a", "a/"], "is named twice"),
    ],
)
def test_what_cannot_be_compared_is_one_line(names, what, tmp_path):
    write_run(tmp_path / "a", entry(1, loss=3.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=what):
        open_runs([f"{tmp_path}/{name}" for name in names])
