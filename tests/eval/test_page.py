"""The page of runs opens anywhere, runs nothing of what it shows, and says what the runs logged."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from data_files import entry, write_run

from errors import UserError
from eval.page import PageTable, write_page
from eval.report import main
from LMConfig import LMConfig
from model.costs import count, human
from training.run.lines import duration
from training.run.log import read_metrics

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=y> </pre> {{ 7 * 7 }} 小镇"


class Page(HTMLParser):
    """Its elements with their attributes, and its texts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(file.read_text(encoding="utf8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    @property
    def pictures(self) -> list[bytes]:
        sources = [attributes["src"] for tag, attributes in self.elements if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


def test_whatever_a_run_holds_is_text_on_the_page_and_nothing_is_loaded(tmp_path):
    sample = {"step": 1, "prompt": HOSTILE + "1", "text": HOSTILE + "2"}
    a = write_run(tmp_path / "<b>a", entry(1), entry(2), samples=(sample,))
    (a / "config.yaml").write_text(f"# {HOSTILE}3\n{HOSTILE}4", encoding="utf8")
    b = write_run(tmp_path / "b", entry(1), entry(3))
    measured = PageTable([HOSTILE + "5", "x"], [[HOSTILE + "6", HOSTILE + "7"]], [HOSTILE + "8"])
    answer = {"question": HOSTILE + "9", "reply": HOSTILE + "10", "answer": HOSTILE + "11", "correct": False}
    write_page([str(a), str(b)], tmp_path / "out" / "report.html", [measured], [answer])
    page = Page(tmp_path / "out" / "report.html")
    assert {HOSTILE + str(number) for number in range(1, 12) if number != 4} | {"<b>a"} <= set(page.texts)
    assert f"# {HOSTILE}3\n{HOSTILE}4" in page.texts
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "b", "base"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(attributes["href"].startswith("#") for tag, attributes in page.elements if tag == "a")
    assert len(page.pictures) == 3 and all(picture.startswith(b"\x89PNG") for picture in page.pictures)
    style = next(text for text in page.texts if "prefers-color-scheme: dark" in text)
    assert "url(" not in style and "@import" not in style
    assert not (a / "curves.png").exists()  # the runs are left as they are


def test_a_real_run_shows_its_size_its_time_its_samples_and_its_command(pretrained, tmp_path, run):
    shutil.copytree(pretrained, tmp_path / "run")
    done = run(main, "--html", tmp_path / "run" / "final", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out == f"written: {tmp_path / 'out' / 'report.html'}\n"
    texts = Page(tmp_path / "out" / "report.html").texts
    costs, last = count(LMConfig.from_pretrained(pretrained / "final")), read_metrics(pretrained / "metrics.jsonl")[-1]
    assert f"{human(costs.total)}, {human(costs.activated)} activated, MTP adds {human(costs.mtp)}" in texts
    assert f"{duration(last['seconds'])} of training" in texts and f"{last['val_bits_per_byte']:.4f}" in texts
    weights = sum(file.stat().st_size for file in (pretrained / "final").glob("*.safetensors"))
    assert any(f": {human(weights, 'B')} of weights, " in text for text in texts)
    assert any(text.startswith("python pretrain.py --config ") and "--max_steps 40" in text for text in texts)
    for line in (pretrained / "samples.jsonl").read_text(encoding="utf8").splitlines():
        assert json.loads(line)["text"].strip() in texts


def test_samples_along_a_long_run_are_the_first_the_last_and_some_between(tmp_path):
    samples = tuple({"step": step, "prompt": f"p{step}", "text": f"t{step}"} for step in range(0, 101, 10))
    run = write_run(tmp_path / "run", entry(1), samples=(*samples, {"step": 100, "prompt": 5}))
    solving = [entry(n, reward=0.5, sample={"question": f"q{n}", "completion": f"c{n}"}) for n in (1, 2)]
    write_page([str(run), str(write_run(tmp_path / "solving", *solving))], tmp_path / "report.html")
    texts = Page(tmp_path / "report.html").texts
    shown = [text for text in texts if text[:1] == "t" and text[1:].isdigit()]
    assert shown == ["t0", "t20", "t40", "t60", "t80", "t100"]
    assert {"q1", "c1", "q2", "c2"} <= set(texts)  # of rewards, each entry has one


def test_curves_that_are_older_than_the_log_are_drawn_again(tmp_path):
    run = write_run(tmp_path / "run", entry(1), entry(2))
    picture = run / "curves.png"
    picture.write_bytes(b"\x89PNG drawn at the end")
    write_page([str(run)], tmp_path / "report.html")
    assert Page(tmp_path / "report.html").pictures == [picture.read_bytes()]
    with open(run / "metrics.jsonl", "a", encoding="utf8") as file:
        file.write(json.dumps(entry(3)) + "\n")
    write_page([str(run)], tmp_path / "report.html")
    (new,) = Page(tmp_path / "report.html").pictures
    assert len(new) > 1000 and picture.read_bytes() == b"\x89PNG drawn at the end"


def test_a_run_that_has_only_begun_has_a_page_and_what_is_no_run_is_one_line(tmp_path, run):
    write_page([str(write_run(tmp_path / "run"))], tmp_path / "report.html")
    assert not Page(tmp_path / "report.html").pictures
    with pytest.raises(UserError, match=r"nowhere: neither metrics\.jsonl"):
        write_page([str(tmp_path / "nowhere")], tmp_path / "report.html")
    done = run(main, f"--html={tmp_path / 'nowhere'}")
    assert done.code == 2 and done.err.count("\n") == 1
