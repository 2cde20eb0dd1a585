"""The arena: pictures drawn once, blind votes through a page that no other page can use, results at the end."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from rich.console import Console

from onestroke import cli
from onestroke.arena import pairs as arena_pairs
from onestroke.arena import server
from onestroke.arena.order import make_trials
from onestroke.arena.pairs import Contestant, Pair, draw_pairs, stamp_of
from onestroke.arena.server import create_app
from onestroke.arena.session import Session
from onestroke.arena.votes import VoteLog, read_votes
from onestroke.commands import arena
from onestroke.errors import DataError, RecipeError, ResourceError
from tests.pipelines import tiny_sdxl

PORT = 8760
LABELS = ("runs/secret-student, 1 step", "secret-teacher, 50 steps")
ADDRESS = f"http://127.0.0.1:{PORT}"
PAGE = Path(server.__file__).parent / "page"


def write_pairs(folder: Path, count: int) -> tuple[Pair, ...]:
    """Pairs of flat pictures: the student's reddish, the teacher's bluish, another for every pair."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for i in range(count):
        paths = folder / f"{i}-a.png", folder / f"{i}-b.png"
        for path, color in zip(paths, ((255, i, 0), (0, i, 255)), strict=True):
            Image.new("RGB", (32, 32), color).save(path)
        pairs.append(Pair(f"a <b>fox</b> number {i}", i, paths))
    return tuple(pairs)


class Voter:
    """A session and a browser's client for it."""

    def __init__(self, folder: Path, count: int = 8) -> None:
        self.pairs = write_pairs(folder / "pictures", count)
        self.log = VoteLog(folder / "votes.jsonl")
        trials = make_trials(count, voter="me")
        self.session = Session(self.pairs, LABELS, trials, self.log, voter="me", now=lambda: "now")
        self.client = TestClient(create_app(self.session, port=PORT), base_url=ADDRESS, follow_redirects=False)
        self.client.headers["Origin"] = ADDRESS

    def state(self) -> dict:
        return self.client.get("/api/trial").json()

    def send(self, quality="left", adherence="tie", *, number=None, **more):
        number = self.state()["trial"]["number"] if number is None else number
        answers = {"number": number, "quality": quality, "adherence": adherence, "seconds": 2.0}
        return self.client.post("/api/votes", json=answers, **more)


@pytest.fixture
def voter(tmp_path):
    voter = Voter(tmp_path)
    yield voter
    voter.log.__exit__(None, None, None)


def color_of(content: bytes) -> tuple[int, int, int]:
    return Image.open(io.BytesIO(content)).getpixel((0, 0))


# pages and votes


def test_a_vote_names_the_model_whose_picture_stood_on_that_side(voter):
    shown = []
    while trial := voter.state()["trial"]:
        shown.append((trial["prompt"], color_of(voter.client.get(trial["left"]).content)))
        assert voter.send("left" if len(shown) % 2 else "right", "right").status_code == 200
    votes = read_votes(voter.log.path).votes
    assert len(votes) == 9 and sum(vote.is_repeat for vote in votes) == 1  # 8 pairs, one twice
    for vote, (prompt, (red, number, blue)) in zip(votes, shown, strict=True):
        assert vote.prompt == prompt == voter.pairs[number].prompt and vote.seed == number
        assert vote.left == LABELS[0 if red else 1] and vote.right == LABELS[1 if red else 0] and blue == 255 - red
        assert (vote.voter, vote.adherence, vote.seconds, vote.time) == ("me", "right", 2.0, "now")
    assert {vote.left for vote in votes} == set(LABELS)


def test_the_browser_never_hears_the_models_names_nor_where_the_pictures_lie(voter):
    said = []

    def get(address):
        response = voter.client.get(address)
        said.append(f"{response.headers} {response.content.decode('latin-1')}")
        return response

    while True:
        for address in ("/", "/api/trial", "/results", "/files/vote.js", "/files/style.css", "/openapi.json", "/docs"):
            get(address)
        trial = voter.state()["trial"]
        if trial is None:
            break
        for side in ("left", "right"):
            get(trial[side])
        response = voter.send()
        said.append(f"{response.headers} {response.text}")
    assert "What the votes say" in said[-5]
    for secret in (*LABELS, "secret", "-a.png", "-b.png", str(voter.log.path.parent), "is_repeat", "last-modified"):
        assert not any(secret in text for text in said), secret


def test_pictures_are_served_for_this_pair_and_the_next_alone(voter):
    first = voter.state()
    names = [first["trial"]["left"], first["trial"]["right"], *first["preload"]]
    assert len(set(names)) == 4
    assert all(voter.client.get(name).status_code == 200 for name in names)
    voter.send()
    second = voter.state()
    assert [second["trial"]["left"], second["trial"]["right"]] == first["preload"]
    assert [voter.client.get(name).status_code for name in names] == [404, 404, 200, 200]
    assert voter.client.get("/pictures/é").status_code == 404


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1:1", "127.0.0.1", ""])
def test_a_foreign_name_for_this_machine_is_refused(voter, host):
    for address in ("/", "/api/trial", voter.state()["trial"]["left"]):
        assert voter.client.get(address, headers={"Host": host}).status_code == 403
    assert voter.send(number=1, headers={"Host": host, "Origin": f"http://{host}"}).status_code == 403
    assert not voter.log.votes


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", f"https://127.0.0.1:{PORT}", "http://127.0.0.1:1", f"127.0.0.1:{PORT}"],
)
def test_another_page_cannot_vote_or_end_the_session(voter, origin):
    assert voter.send(headers={"Origin": origin}).status_code == 403
    assert voter.client.post("/api/finish", headers={"Origin": origin}).status_code == 403
    del voter.client.headers["Origin"]
    assert voter.send().status_code == 403
    assert not voter.log.votes and not voter.session.is_finished
    for name in ("127.0.0.1", "localhost"):
        own = {"Host": f"{name}:{PORT}", "Origin": f"http://{name}:{PORT}"}
        assert voter.send(headers=own).status_code == 200


def test_every_answer_forbids_frames_and_foreign_content(voter):
    for response in (voter.client.get("/"), voter.client.get("/nowhere"), voter.client.get("/", headers={"Host": "x"})):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere():
    for path in PAGE.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", "")), path.name
        assert not re.search(r"\son[a-z]+=|style=|<style|<script>", text), path.name  # which the policy would block


def test_a_vote_counts_once_and_only_for_the_pair_that_is_shown(voter):
    assert voter.send(number=1).status_code == 200
    again = voter.send(number=1)
    assert again.status_code == 409 and again.json()["trial"]["number"] == 2
    assert voter.send(number=5).status_code == 409
    assert len(voter.log.votes) == 1


@pytest.mark.parametrize(
    "change",
    [{"quality": "both"}, {"adherence": None}, {"seconds": -1}, {"seconds": 1e9}, {"model": "x"}, {"number": "first"}],
)
def test_an_answer_of_another_kind_is_refused(voter, change):
    answers = {"number": 1, "quality": "left", "adherence": "left", "seconds": 1.0} | change
    assert voter.client.post("/api/votes", json=answers).status_code == 422
    assert not voter.log.votes


def test_a_vote_that_the_disk_does_not_take_is_told_and_asked_again(voter, monkeypatch):
    def full(vote):
        raise ResourceError("the votes cannot be written (No space left on device)", where="votes.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(voter.log, "append", full)
        response = voter.send()
    assert response.status_code == 500 and "No space left" in response.json()["detail"]
    assert voter.state()["trial"]["number"] == 1
    assert voter.send().status_code == 200


def test_results_are_seen_after_the_last_vote_only_and_call_models_by_their_roles(voter):
    assert voter.client.get("/results").headers["location"] == "/"
    while trial := voter.state()["trial"]:
        is_student_left = color_of(voter.client.get(trial["left"]).content)[0] == 255
        voter.send("left" if is_student_left else "right", "tie")
    assert voter.client.get("/").headers["location"] == "/results"
    text = re.sub(r"<[^>]*>", " ", voter.client.get("/results").text)
    assert "The student is preferred" in text and "No preference can be claimed" in text
    assert "8 pairs judged blind, 1 of them twice" in text
    assert voter.send(number=1).status_code == 409


def test_who_stops_early_sees_results_and_votes_no_more(voter):
    voter.send()
    state = voter.client.post("/api/finish", json={}).json()
    assert state["trial"] is None and state["preload"] == []
    assert voter.send(number=2).status_code == 409 and len(voter.log.votes) == 1
    assert "1 pair judged blind" in voter.client.get("/results").text


def test_results_without_a_vote_say_so(voter):
    voter.client.post("/api/finish", json={})
    assert "No pair was voted on" in voter.client.get("/results").text


def test_a_session_goes_on_where_the_votes_file_ends(tmp_path):
    first = Voter(tmp_path)
    whole = [first.session.trials[i].pair for i in range(len(first.session.trials))]
    for _ in range(4):
        first.send()
    first.log.__exit__(None, None, None)
    second = Voter(tmp_path)
    assert second.state()["trial"]["number"] == 5
    while second.state()["trial"]:
        second.send()
    assert [vote.seed for vote in second.log.votes] == whole
    second.log.__exit__(None, None, None)


# pairs


def drawing(monkeypatch, log: list) -> None:
    def draw(pipeline, prompts, *, seeds, steps, guidance):
        log.append((pipeline, list(prompts), list(seeds), steps, guidance))
        return np.stack([np.full((8, 8, 3), seed, np.uint8) for seed in seeds])

    monkeypatch.setattr(arena_pairs, "draw", draw)


def test_pairs_share_prompt_and_seed_and_are_drawn_once(tmp_path, monkeypatch):
    calls, loaded = [], []
    drawing(monkeypatch, calls)
    both = (Contestant("s", 1, 0.0, "stamp"), Contestant("t", 50, 2.0))

    def load(name):
        loaded.append(name)
        return name

    prompts = [f"prompt {i}" for i in range(20)]
    pairs = draw_pairs(both, prompts, tmp_path, load=load, first_seed=7)
    assert loaded == ["s", "t"] and [len(call[1]) for call in calls] == [16, 4, 16, 4]
    assert calls[0][2:] == (list(range(7, 23)), 1, 0.0) and calls[2][2:] == (list(range(7, 23)), 50, 2.0)
    assert [(pair.prompt, pair.seed) for pair in pairs] == [(f"prompt {i}", 7 + i) for i in range(20)]
    assert np.asarray(Image.open(pairs[3].pictures[1]))[0, 0, 0] == 10
    assert draw_pairs(both, prompts, tmp_path, load=load, first_seed=7) == pairs and loaded == ["s", "t"]
    pairs[5].pictures[1].unlink()
    draw_pairs(both, prompts, tmp_path, load=load, first_seed=7)
    assert loaded == ["s", "t", "t"] and calls[-1][1:3] == (["prompt 5"], [12])


def test_another_state_of_a_models_files_is_another_model(tmp_path, monkeypatch):
    drawing(monkeypatch, [])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    before = stamp_of(tmp_path / "model")
    assert before == stamp_of(tmp_path / "model") != ""
    (tmp_path / "model" / "weights").write_text("12")
    stamps = (before, stamp_of(tmp_path / "model"))
    teacher = Contestant("t", 2, 0.0)
    files = [
        draw_pairs((Contestant("s", 1, 0.0, stamp), teacher), ["a"], tmp_path / "out", load=str)[0].pictures
        for stamp in stamps
    ]
    assert files[0][0] != files[1][0] and files[0][1] == files[1][1]


def test_a_model_is_not_compared_with_itself(tmp_path):
    with pytest.raises(RecipeError, match="the same"):
        draw_pairs((Contestant("s", 1, 0.0), Contestant("s", 1, 2.0)), ["a"], tmp_path, load=str)


def test_prompts_that_cannot_be_used_are_told(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\n  a café \n".encode())
    assert arena.prompts_of(path, None, "t") == ["a fox", "a café"]
    assert arena.prompts_of(path, 1, "t") == ["a fox"]
    with pytest.raises(DataError, match="2 prompts where 3"):
        arena.prompts_of(path, 3, "t")
    for content, reason in ((b" \n", "no prompt"), (b"caf\xe9\n", "not UTF-8 text .byte 3")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            arena.prompts_of(path, None, "t")
    with pytest.raises(DataError, match="cannot be read"):
        arena.prompts_of(tmp_path / "none.txt", None, "t")
    with pytest.raises(RecipeError, match="--prompts"):
        arena.prompts_of(None, None, "some/teacher")
    assert len(set(arena.prompts_of(None, 3, "embedded-teacher"))) == 3


def test_a_teacher_of_the_users_needs_its_guidance():
    with pytest.raises(RecipeError, match="--guidance"):
        arena.contestants_of("s", "t", 1, 50, None)
    assert arena.contestants_of("s", "embedded-teacher", 1, 50, None)[1].guidance == arena.GUIDANCE
    student, teacher = arena.contestants_of("s", "t", 4, 25, 5.0)
    assert (student.label, student.guidance, teacher.label, teacher.guidance) == ("s, 4 steps", 0.0, "t, 25 steps", 5.0)


# the command


def paper() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_the_command_draws_takes_votes_and_prints_what_they_say(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a fox\na hare\n")
    monkeypatch.setattr(arena, "load", lambda name: tiny_sdxl())

    def serve(session, listener):
        while not session.is_finished:
            session.vote(session.shown()[0].number, "left", "tie", seconds=1.0)

    monkeypatch.setattr(server, "serve", serve)
    order = {"prompts": tmp_path / "prompts.txt", "num_prompts": None, "steps": 1, "teacher_steps": 2, "guidance": 2.0}
    order |= {"votes": None, "voter": "me", "seed": 0, "port": 0}
    for _ in range(2):
        console = paper()
        arena.run_arena("a/student", "a/teacher", tmp_path / "out", **order, console=console)
        assert "http://127.0.0.1:" in console.file.getvalue()
        assert "a/student, 1 step against a/teacher, 2 steps" in console.file.getvalue()
    assert len(read_votes(tmp_path / "out" / "votes.jsonl").votes) == 2
    with (tmp_path / "out" / "votes.jsonl").open("a") as file:
        file.write('{"voter')
    monkeypatch.setattr(sys, "argv", ["onestroke", "arena", "--results", str(tmp_path / "out" / "votes.jsonl")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "2 votes" in printed and "warning: the last line" in printed


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["onestroke", "arena", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "two models are needed" in run("embedded")
    assert "no such votes file" in run("--results", str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "no vote in this file" in run("--results", str(tmp_path / "empty.jsonl"))
    monkeypatch.setattr(arena, "PACKAGES", ("evalica", "no_such_package"))
    assert "no_such_package is not installed" in run("embedded", "embedded-teacher")


def test_a_port_in_use_is_told():
    with server.open_socket(0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ResourceError, match=f"port {port}.*--port"):
            server.open_socket(port)
