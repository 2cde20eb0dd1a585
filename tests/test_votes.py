"""Votes: kept through crashes, and turned into ratings that a hand can check."""

import json
import math
import os

import evalica
import pytest

from onestroke.arena.order import GAP, make_trials
from onestroke.arena.ratings import (
    Games,
    bradley_terry,
    bradley_terry_points,
    consistency,
    elo_ratings,
    games_of,
    outcome,
    results_of,
)
from onestroke.arena.summary import lines
from onestroke.arena.votes import Vote, VoteLog, read_votes
from onestroke.errors import DataError, ResourceError

X, Y, DRAW = evalica.Winner.X, evalica.Winner.Y, evalica.Winner.Draw


def vote(quality="left", adherence="tie", *, left="student", right="teacher", seed=0, **more) -> Vote:
    return Vote(
        voter="me", prompt="a fox ☃", seed=seed, left=left, right=right, quality=quality, adherence=adherence, **more
    )


def games(wins: int, losses: int, ties: int = 0) -> Games:
    count = wins + losses + ties
    return Games(["student"] * count, ["teacher"] * count, [X] * wins + [Y] * losses + [DRAW] * ties)


# the file


def test_a_vote_is_on_the_disk_when_append_returns_and_reads_back(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), synced.append(descriptor)))
    votes = [vote("right", seed=i, seconds=1.5, time="2030-01-01T00:00:00+00:00") for i in range(3)]
    with VoteLog(tmp_path / "runs" / "votes.jsonl") as log:
        for n, one in enumerate(votes):
            log.append(one)
            assert len(synced) == n + 1
            assert read_votes(log.path).votes == tuple(votes[: n + 1])
    assert [json.loads(line)["seed"] for line in log.path.read_text("utf-8").splitlines()] == [0, 1, 2]
    with VoteLog(log.path) as again:
        again.append(vote(seed=3))
    assert len(read_votes(log.path).votes) == 4


def test_a_file_cut_off_anywhere_keeps_its_whole_votes_and_goes_on(tmp_path):
    votes = [vote(seed=i) for i in range(2)]
    content = b"".join(one.model_dump_json().encode() + b"\n" for one in votes)
    first = content.index(b"\n")
    for cut in range(len(content) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(content[:cut])
        whole = (cut >= first) + (cut >= len(content) - 1)
        assert read_votes(path).votes == tuple(votes[:whole])
        assert path.read_bytes() == content[:cut]  # reading changes nothing
        with VoteLog(path) as log:
            log.append(vote(seed=9))
        assert [one.seed for one in read_votes(path).votes] == [*range(whole), 9]
        assert read_votes(path).unfinished == b""
        backup = tmp_path / f"{cut}.jsonl.bak"
        assert backup.exists() == bool(log.unfinished)
        if log.unfinished:
            assert content[:cut].endswith(backup.read_bytes().rstrip(b"\n"))


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path):
    path = tmp_path / "votes.jsonl"
    whole = vote().model_dump_json()
    for broken, reason in (('{"voter": "me"', "JSON"), (whole.replace('"tie"', '"draw"'), "adherence")):
        path.write_text(f"{whole}\n{broken}\n{whole}\n")
        before = path.read_bytes()
        with pytest.raises(DataError, match=rf"line 2.*{reason}"):
            VoteLog(path)
        assert path.read_bytes() == before
        path.write_text("")
        VoteLog(path).__exit__(None, None, None)  # the lock was given back


def test_one_arena_at_a_time_writes_to_a_file(tmp_path):
    with VoteLog(tmp_path / "votes.jsonl"), pytest.raises(ResourceError, match="another arena"):
        VoteLog(tmp_path / "votes.jsonl")
    VoteLog(tmp_path / "votes.jsonl").__exit__(None, None, None)


def test_a_full_disk_leaves_whole_votes(tmp_path, monkeypatch):
    write = os.write

    def half(descriptor, line):
        if len(line) < 50:
            raise OSError(28, "No space left on device")
        return write(descriptor, line[: len(line) - 20])

    with VoteLog(tmp_path / "votes.jsonl") as log:
        log.append(vote(seed=1))
        before = log.path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(ResourceError, match="No space left"):
                log.append(vote(seed=2))
        assert log.path.read_bytes() == before and len(log.votes) == 1
        log.append(vote(seed=3))
    assert [one.seed for one in read_votes(log.path).votes] == [1, 3]


# ratings


def test_elo_matches_hand_computation_with_k_1_from_1000():
    surprise = 1 - 1 / (1 + 10 ** (-1 / 400))  # of a second win, one point ahead
    ratings = elo_ratings(games(2, 0), num_shuffles=20)
    assert ratings["student"].value == pytest.approx(1000.5 + surprise)
    assert ratings["teacher"].value == pytest.approx(999.5 - surprise)
    assert ratings["student"].low == ratings["student"].high == pytest.approx(ratings["student"].value)
    assert elo_ratings(games(0, 0, 3), num_shuffles=5)["student"].value == 1000


def test_elo_averages_over_orders_and_its_interval_is_that_of_the_orders():
    lost = 1 - 1 / (1 + 10 ** (1 / 400)) - 0.5  # what a loss after a win takes beyond half a point
    rating = elo_ratings(games(1, 1), num_shuffles=400)["student"]
    assert (rating.low, rating.high) == (pytest.approx(1000 - lost), pytest.approx(1000 + lost))
    assert abs(rating.value - 1000) < lost / 5  # either order half of the time


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "odds"), [(30, 10, 0, 3), (30, 10, 20, 2), (9, 1, 0, 9), (0, 0, 4, 1)]
)
def test_bradley_terry_of_two_models_is_the_ratio_of_wins(wins, losses, ties, odds):
    scores = bradley_terry(games(wins, losses, ties), num_resamples=2).result.scores
    assert scores["student"] - scores["teacher"] == pytest.approx(400 * math.log10(odds), abs=1e-3)
    assert scores.mean() == pytest.approx(1000)


def test_bradley_terry_of_three_models_finds_strengths_that_explain_all_counts():
    counts = {("a", "b"): (2, 1), ("b", "c"): (2, 1), ("a", "c"): (4, 1)}  # strengths 4, 2, 1
    rows = [(*pair, side) for pair, (w, l) in counts.items() for side in [X] * w + [Y] * l]  # noqa: E741
    xs, ys, winners = map(list, zip(*rows, strict=True))
    scores = bradley_terry_points(xs, ys, winners, Games(xs, ys, winners).models).scores
    step = 400 * math.log10(2)
    assert [scores[name] for name in "abc"] == pytest.approx([1000 + step, 1000, 1000 - step], abs=1e-2)


def test_a_shut_out_is_finite_and_claimed_only_by_enough_votes():
    few = outcome([vote("left", seed=i) for i in range(3)], "quality").duels[0]
    many = outcome([vote("left", seed=i) for i in range(10)], "quality").duels[0]
    assert few.chance.value == pytest.approx(3.5 / 4, abs=1e-4)  # one tie more
    assert many.chance.value == pytest.approx(10.5 / 11, abs=1e-4)
    assert few.p_value == pytest.approx(0.25) and few.preferred is None
    assert many.p_value == pytest.approx(2 / 2**10) and many.preferred == "student"


def test_the_interval_is_as_wide_as_a_share_of_so_many_votes_is():
    votes = [vote("left" if i < 60 else "right", seed=i) for i in range(100)]
    duel = outcome(votes, "quality").duels[0]
    reach = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert duel.chance.value == pytest.approx(0.6, abs=1e-4)
    assert duel.chance.low == pytest.approx(0.6 - reach, abs=0.02)
    assert duel.chance.high == pytest.approx(0.6 + reach, abs=0.02)
    turned = duel.seen_from("teacher")
    assert (turned.wins, turned.losses) == (40, 60) and turned.chance.high == pytest.approx(1 - duel.chance.low)
    assert duel.seen_from("student") is duel and turned.preferred == duel.preferred


def test_sides_are_told_apart_from_models_and_questions_from_each_other():
    votes = [vote("left", "right"), vote("right", "tie", left="teacher", right="student", seed=1)]
    assert [one.preferred("quality") for one in votes] == ["student", "student"]
    assert [one.preferred("adherence") for one in votes] == ["teacher", None]
    quality, adherence = (outcome(votes, question).duels[0] for question in ("quality", "adherence"))
    assert (quality.wins, quality.losses, quality.ties) == (2, 0, 0)
    assert (adherence.wins, adherence.losses, adherence.ties) == (0, 1, 1)
    assert outcome(votes, "quality").ratings[0].model == "student"
    assert outcome(votes, "adherence").ratings[0].model == "teacher"


def test_repeats_check_the_voter_and_count_in_no_rating():
    votes = [vote(answer, seed=i) for i, answer in enumerate(["left", "left", "tie", "right"])]
    votes += [
        vote(answer, left="teacher", right="student", seed=i, is_repeat=True)
        for i, answer in enumerate(["right", "left", "tie", "tie"])  # the same, opposite, the same, neither
    ]
    assert len(games_of(votes, "quality")) == 4
    row = consistency(votes, "me", "quality")
    assert (row.count, row.same, row.opposite) == (4, 2, 1)
    assert (row.left, row.right) == (3, 2)
    assert consistency(votes, "you", "quality").count == 0
    assert (results_of(votes).num_votes, results_of(votes).num_repeats) == (4, 4)
    printed = "\n".join(lines(results_of(votes)))
    assert "student against teacher: 2 won, 1 tied, 1 lost" in printed and "2 of 4 the same, 1 opposite" in printed
    with pytest.raises(DataError, match="no vote yet"):
        results_of(votes[4:])


# the order


def test_every_pair_comes_once_and_some_again_with_their_sides_swapped():
    trials = make_trials(40, voter="me")
    firsts = [trial for trial in trials if not trial.is_repeat]
    assert sorted(trial.pair for trial in firsts) == list(range(40))
    assert sum(trial.is_swapped for trial in firsts) == 20
    assert [trial.pair for trial in firsts] != list(range(40))
    assert sum(trial.is_repeat for trial in trials) == 6
    for place, trial in enumerate(trials):
        if trial.is_repeat:
            before = next(i for i, first in enumerate(trials) if first.pair == trial.pair)
            assert place - before >= GAP and trials[before].is_swapped != trial.is_swapped


def test_an_order_is_the_voters_own_and_stays():
    assert make_trials(20, voter="me") == make_trials(20, voter="me")
    assert make_trials(20, voter="me") != make_trials(20, voter="you")
    assert make_trials(20, voter="me", seed=1) != make_trials(20, voter="me")
    assert [len(make_trials(count, voter="me")) for count in (1, 2, 3, 7)] == [1, 2, 3, 8]
