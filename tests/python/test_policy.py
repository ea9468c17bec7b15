"""adaattn.Policy: how thresholds move from call to call, what is kept in files, and how layers are told apart."""

import copy
import json
import math
import pickle
import random
import statistics
import threading
from dataclasses import replace

import adaattn
import numpy as np
import pytest
from adaattn import _policy_rule as rule
from adaattn import policy as policy_module
from adaattn._library import HEAD_REPORT_WORDS, HeadReport
from adaattn._policy_rule import HeadRule, HeadState, Seen
from adaattn.metrics import HeadReports
from adaattn.plan import Plan

BUDGET = 0.01
TOKENS = 5000
TILED = HeadRule("tiled", screen=-3.0, low=-1.0, drop=0.004)
SETTLED = HeadState(TILED, trend=-0.2, spread=0.05, patience=0)


def seen(head_rule=TILED, escalated=False, x=-0.2, work=0.5):
    return Seen(head_rule, escalated, x, work)


class Engine:
    """A head whose error is level * share ** slope * noise, and an engine that holds 1.6 times that below the budget.

    On a miss the engine takes rules 1.2 nats more careful until one is accepted, as src/plan does.
    """

    def __init__(self, slope, noise, level=1.0):
        self.slope, self.noise, self.level = slope, noise, level
        self.random = random.Random(0)

    def error(self, screen):
        return self.level * math.exp(screen * self.slope + self.random.gauss(0, self.noise))

    def ideal(self):
        """The screen whose error is what the loop aims at, without noise."""
        return math.log(rule.AIM * BUDGET / 1.6 / self.level) / self.slope

    def call(self, state):
        start = rule.next_rule(state)
        if start.form == rule.AUTOMATIC:
            start = HeadRule("tiled", screen=rule.LARGEST_SHARE, low=-math.inf, drop=BUDGET)
            while self.error(start.screen) * 1.6 > BUDGET:  # the pilot
                start = start.moved(-0.8)
        factor = math.exp(self.random.gauss(0, self.noise))  # of this input
        final, misses = start, 0
        while (error := self.level * math.exp(final.screen * self.slope) * factor) * 1.6 > BUDGET:
            final, misses = final.moved(-1.2), misses + 1
        return rule.updated(state, Seen(final, misses > 0, rule.log_ratio(1.6 * error, BUDGET), work=0.5)), misses > 0


def run(engine, calls, state=None):
    """The states after each call, and whether it missed."""
    state, states, misses = state or HeadState(), [], []
    for _ in range(calls):
        state, missed = engine.call(state)
        states.append(state)
        misses.append(missed)
    return states, misses


class TestLoop:
    @pytest.mark.parametrize("slope", [0.5, 0.7, 1.0])
    def test_converges_without_noise(self, slope):
        states, misses = run(Engine(slope, noise=0.0), 100)
        # The least spread and the dead band leave at most this much of the aim unused, in nats of error; a first plan
        # may be anywhere up to what is accepted.
        margin = (2 * rule.LEAST_SPREAD + 2 * rule.DEAD_BAND) / slope
        assert not any(misses)
        ideal = Engine(slope, 0.0).ideal()
        assert all(ideal - margin <= state.rule.screen <= ideal + rule.REFUSED / slope for state in states[40:])
        assert states[40].rule == states[-1].rule  # at rest

    @pytest.mark.parametrize("noise", [0.1, 0.3, 0.6])
    def test_inputs_that_vary_rarely_miss(self, noise):
        engine = Engine(0.5, noise)
        states, misses = run(engine, 600)
        assert sum(misses) / len(misses) < 0.06
        # It stays away from its budget by no more than the noise asks for: 2 spreads and what misses add.
        away = engine.ideal() - statistics.mean(state.rule.screen for state in states[100:])
        assert 0 < away < 2 * rule.SPREADS * noise / engine.slope + 0.3

    def test_does_not_oscillate(self):
        states, _ = run(Engine(0.6, noise=0.2), 400)
        screens = [state.rule.screen for state in states[100:]]
        # A step back of a miss, and the noise of the averages, but no swings.
        assert statistics.pstdev(screens) < 0.5

    def test_harder_inputs_are_met_at_once(self):
        engine = Engine(0.6, noise=0.0)
        states, _ = run(engine, 60)
        engine.level *= 3
        states, misses = run(engine, 60, states[-1])
        assert misses[0]
        assert sum(misses) <= 2
        assert states[2].rule.screen <= engine.ideal() + 0.25
        assert states[-1].rule.screen == pytest.approx(engine.ideal(), abs=0.4)

    def test_easier_inputs_are_followed_slowly(self):
        engine = Engine(0.6, noise=0.0)
        states, _ = run(engine, 60)
        before = states[-1].rule.screen
        engine.level /= 10
        states, misses = run(engine, 60, states[-1])
        assert states[0].rule.screen - before <= rule.MOST_RELAXING
        assert not any(misses)
        assert states[-1].rule.screen == pytest.approx(engine.ideal(), abs=0.5)


class TestStep:
    def test_a_first_call_keeps_the_engines_plan(self):
        state = rule.updated(HeadState(), seen())
        assert state.rule == TILED
        assert state.trend == -0.2

    def test_a_miss_backs_off_at_once(self):
        accepted = TILED.moved(-0.8)
        state = rule.updated(SETTLED, seen(accepted, escalated=True, x=-0.5))
        assert state.rule == TILED.moved(-rule.BACK_OFF)  # more careful than what the engine took
        assert rule.updated(SETTLED, seen(TILED.moved(-3), escalated=True)).rule == TILED.moved(-3)
        for _ in range(rule.PATIENCE):  # and stays there, however good the calls
            state = rule.updated(state, seen(state.rule, x=-2))
            assert state.rule == TILED.moved(-rule.BACK_OFF)

    def test_what_is_off_stays_off(self):
        off = replace(TILED, screen=-math.inf, low=-math.inf, drop=0.0)
        assert off.moved(1.0) == off.moved(-1.0) == off
        wide = TILED.moved(100)
        assert (wide.screen, wide.low, wide.drop) == (math.log(0.5), math.log(0.5), 1.0)
        assert replace(TILED, low=0.0).moved(-1.0).low == 0.0  # all tiles that can be low are

    def test_a_worthless_plan_runs_densely(self):
        state = rule.updated(SETTLED, seen(work=0.99))
        assert state.rule.form == "dense"
        # Work of a call that ran twice says nothing about the plan that was accepted.
        assert rule.updated(SETTLED, seen(escalated=True, work=1.4)).rule.form == "tiled"

    def test_dense_heads_rest_and_are_tried_again(self):
        dense = HeadRule("dense")
        state, rests = HeadState(), []
        for _ in range(3):
            assert rule.next_rule(state).form == "automatic"
            state = rule.updated(state, seen(dense))
            rests.append(state.rest)
            for _ in range(state.rest):
                assert rule.next_rule(state) == dense
                state = rule.updated(state, seen(dense))
        assert rests == [rule.FIRST_REST, 2 * rule.FIRST_REST, 4 * rule.FIRST_REST]
        state = rule.updated(state, seen())
        assert state.rule == TILED
        assert state.failures == 3  # until it has proven itself
        for _ in range(rule.PATIENCE + 1):
            state = rule.updated(state, seen(state.rule))
        assert state.failures == 0

    def test_a_dense_plan_that_misses_is_left_at_once(self):
        state = rule.updated(HeadState(), seen(HeadRule("dense", precision="int8"), work=0.6))
        assert rule.next_rule(state).precision == "int8"
        finer = HeadRule("dense", precision="float32")
        state = rule.updated(state, seen(finer, escalated=True, work=1.7))
        assert state.rest > 0
        assert rule.next_rule(state) == finer

    def test_rests_do_not_grow_without_end(self):
        state = rule.updated(HeadState(failures=10**6), seen(HeadRule("dense")))
        assert state.rest == rule.MOST_REST

    def test_errors_of_nothing(self):
        assert rule.log_ratio(0.0, 0.1) == rule.log_ratio(1e-30, 0.1) == rule.LEAST_X
        assert rule.log_ratio(0.08, 0.1) == pytest.approx(0)
        assert rule.log_ratio(0.1, 0.1) == pytest.approx(rule.REFUSED)


class TestOnDevice:
    """Engines on GPUs, which find thresholds in each call."""

    def test_tiled_heads_stay_the_engines_to_plan(self):
        state = HeadState()
        for screen in (-3.0, -2.5, -5.0):
            assert rule.next_rule(state, on_device=True) == HeadRule("automatic")
            state = rule.followed(state, seen(replace(TILED, screen=screen)))
            assert state.rule.screen == screen
        state = rule.followed(state, seen(TILED, escalated=True))  # in few entries of a batch
        assert rule.next_rule(state, on_device=True) == HeadRule("automatic")

    @pytest.mark.parametrize(
        "found",
        [
            seen(HeadRule("dense"), x=rule.LEAST_X, work=1.08),  # judged to save too little
            seen(HeadRule("dense"), escalated=True, x=rule.LEAST_X, work=1.4),  # over its budget in most entries
            seen(TILED, escalated=True, work=1.05),  # over it in few, which cost what the others save
            seen(TILED, work=0.95),
        ],
    )
    def test_heads_that_save_nothing_rest_and_are_tried_ever_more_rarely(self, found):
        dense, state, rests = seen(HeadRule("dense"), x=rule.LEAST_X, work=1.0), HeadState(), []
        for _ in range(12):
            assert rule.next_rule(state, on_device=True).form == "automatic"
            state = rule.followed(state, found)
            rests.append(state.rest)
            for _ in range(state.rest):
                assert rule.next_rule(state, on_device=True).form == "dense"
                state = rule.followed(state, dense)
        assert rests[:3] == [rule.FIRST_REST, 2 * rule.FIRST_REST, 4 * rule.FIRST_REST]
        assert rests[-1] == rule.MOST_REST
        for failures in (12, 0):  # a retry that saves has to do so twice
            state = rule.followed(state, seen())
            assert state.failures == failures
        assert rule.followed(state, found).rest == rule.FIRST_REST

    def test_reports_of_a_batch(self):
        """Reports as sm90_adaptive makes them: heads that ran again are dense ones, without an estimate."""
        policy, kept = adaattn.Policy(), {"error": BUDGET, "on_device": True}
        form = np.array([[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 1, 0]])
        escalations = np.array([[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
        work = np.where(form == 1, np.array([[0.4, 0, 0.93, 0.4]]), 1.08) + 0.5 * escalations
        limit = np.where(form == 1, 0.008, 0.0)
        first = reports(batch=3, heads=4, form=form, escalations=escalations, work=work, limit=limit, precision=2)
        assert policy.next_plan("a", 4, TOKENS, **kept) == Plan.automatic(1, 4)
        policy.record("a", first, TOKENS, **kept)
        forms = policy.next_plan("a", 4, TOKENS, **kept).form.tolist()
        assert forms == [["automatic", "dense", "dense", "dense"]]
        found = policy.statistics()
        assert (found.calls, found.heads, found.escalated, found.dense) == (1, 12, 3, 6)
        again = adaattn.Policy.from_json(policy.to_json())
        assert again.next_plan("a", 4, TOKENS, **kept).form.tolist() == forms

    def test_a_layer_of_dense_heads_runs_exactly_between_retries(self):
        """An exact kernel's reports are those of dense heads."""
        policy, kept, planned = adaattn.Policy(), {"error": BUDGET, "on_device": True}, []
        for _ in range(2 * rule.FIRST_REST):
            form = policy.next_plan("a", 2, TOKENS, **kept).form[0, 0]
            planned.append(form)
            policy.record("a", reports(form=0, limit=0.0, work=1.08 if form == "automatic" else 1.0), TOKENS, **kept)
        assert [at for at, form in enumerate(planned) if form == "automatic"] == [0, rule.FIRST_REST + 1]


def report_words(
    batch=1, heads=2, form=1, limit=0.0064, escalations=0, work=0.5, screen=-3.0, bound=math.inf, precision=0
):
    """The words of what a call reports; each argument broadcasts to (batch, heads)."""
    words = np.zeros((batch, heads, HEAD_REPORT_WORDS), np.int64)
    records = words.view(np.dtype(HeadReport))[..., 0]
    records["plan"]["form"], records["plan"]["screen"], records["plan"]["drop"] = form, screen, 0.001
    records["plan"]["precision"] = records["plan"]["low_precision"] = precision
    records["escalations"], records["estimated_limit"], records["work"] = escalations, limit, work
    records["error_bound"] = bound
    return words


def reports(*shape, **values):
    return HeadReports.from_words(report_words(*shape, **values))


def called(policy, layer="a", heads=2, error=BUDGET, **changes):
    plan = policy.next_plan(layer, heads, TOKENS, error=error)
    policy.record(layer, reports(heads=heads, **changes), TOKENS, error=error)
    return plan


class TestPolicy:
    def test_the_engine_plans_first(self):
        policy = adaattn.Policy()
        assert called(policy) == Plan.automatic(1, 2)
        assert policy.next_plan("a", 2, TOKENS, error=BUDGET).form.tolist() == [["tiled", "tiled"]]
        assert policy.next_plan("a", 2, TOKENS, error=BUDGET).screen.tolist() == [[-3.0, -3.0]]
        assert policy.next_plan("b", 5, TOKENS, error=BUDGET) == Plan.automatic(1, 5)
        assert policy.layers == ("a",)  # nothing is kept of a layer before its first report
        with pytest.raises(KeyError):
            policy.plan("b", TOKENS)

    def test_the_worst_batch_entry_counts(self):
        policy = adaattn.Policy()
        policy.next_plan("a", 2, TOKENS, error=BUDGET)
        policy.record(
            "a", reports(batch=3, precision=3, screen=np.array([[-3, -3], [-5, -2], [-4, -4]])), TOKENS, error=BUDGET
        )
        assert policy.plan("a", TOKENS).screen.tolist() == [[-5, -4]]
        int8 = np.array([[3, 3], [0, 3], [3, 3]])
        policy.record("a", reports(batch=3, precision=int8, escalations=1), TOKENS, error=BUDGET)
        assert policy.plan("a", TOKENS).precision.tolist() == [["float32", "int8"]]
        assert policy.plan("a", TOKENS).screen.tolist() == [[-6, -5]]  # misses
        # One entry that had to run densely is a miss; most of them make a dense head.
        policy.record(
            "a", reports(batch=3, form=np.array([[1, 1], [0, 0], [1, 0]]), escalations=1), TOKENS, error=BUDGET
        )
        assert policy.plan("a", TOKENS).form.tolist() == [["tiled", "dense"]]

    def test_another_budget_is_planned_anew(self):
        policy = adaattn.Policy()
        called(policy)
        assert policy.next_plan("a", 2, TOKENS, error=2 * BUDGET) == Plan.automatic(1, 2)
        called(policy)
        assert policy.next_plan("a", 2, TOKENS, error=BUDGET, guarantee="bounded") == Plan.automatic(1, 2)

    def test_lengths_learn_apart(self):
        policy = adaattn.Policy()
        called(policy, form=0)
        for tokens, form in (
            (4096, "dense"),
            (8191, "dense"),
            (8192, "automatic"),
            (4095, "automatic"),
            (0, "automatic"),
        ):
            assert policy.next_plan("a", 2, tokens, error=BUDGET).form.tolist() == [[form] * 2]
        assert policy.layers == ("a",)

    def test_a_report_for_another_budget_starts_anew(self):
        policy = adaattn.Policy()
        called(policy, screen=-9.0)
        policy.record("a", reports(screen=-2.0), TOKENS, error=2 * BUDGET)
        assert policy.next_plan("a", 2, TOKENS, error=2 * BUDGET).screen.tolist() == [[-2.0, -2.0]]

    def test_bounds_are_what_bounded_calls_are_judged_by(self):
        policies = [adaattn.Policy(), adaattn.Policy()]
        for policy, bound in zip(policies, (0.001, 0.0099), strict=True):
            for _ in range(12):
                plan = policy.next_plan("a", 2, TOKENS, error=BUDGET, guarantee="bounded")
                screen = plan.screen if plan.form[0, 0] == "tiled" else -3.0
                policy.record("a", reports(screen=screen, bound=bound), TOKENS, error=BUDGET, guarantee="bounded")
        assert (policies[0].plan("a", TOKENS).screen > -3).all()
        assert (policies[1].plan("a", TOKENS).screen == -3).all()

    def test_statistics(self):
        policy = adaattn.Policy()
        assert policy.statistics().to_dict()["work"] is None
        called(policy, work=np.array([[0.2, 0.4]]))
        called(policy, escalations=np.array([[0, 2]]), form=np.array([[1, 0]]), work=0.9)
        found = policy.statistics(reset=True)
        assert (found.calls, found.heads, found.escalated, found.dense) == (2, 4, 1, 1)
        assert found.work == pytest.approx(0.6)
        assert policy.statistics().calls == 0

    def test_table(self):
        policy = adaattn.Policy()
        assert policy.describe() == "no layer has been called yet"
        called(policy, form=np.array([[1, 0]]))
        lines = policy.describe().splitlines()
        assert lines[0] == "layer a, 4,096 to 8,191 tokens, error 0.01, measured"
        assert lines[1].endswith("kept error / aim")
        assert lines[2].endswith("0.80")
        assert lines[3].endswith("planned anew after 16 calls")

    def test_another_head_count(self):
        policy = adaattn.Policy()
        called(policy)
        with pytest.raises(adaattn.PolicyMismatchError, match="has 2 heads for layer 'a', but q has 3: it was"):
            policy.next_plan("a", 3, TOKENS, error=BUDGET)
        policy.check_model(1, 2)
        for layers, heads in ((2, 2), (1, 3)):
            with pytest.raises(ValueError, match="for another model: it has 1 layers of 2 heads, the model has"):
                policy.check_model(layers, heads)
        adaattn.Policy().check_model(30, 9)  # a new one suits every model

    def test_modules_are_numbered_by_their_first_calls(self):
        torch = pytest.importorskip("torch")
        policy, first, second = adaattn.Policy(), torch.nn.Identity(), torch.nn.Identity()
        assert [policy.layer_name(x) for x in (first, second, first, "name", 7)] == ["0", "1", "0", "name", "7"]
        del first  # its number is free again
        assert policy.layer_name(torch.nn.Identity()) == "0"

    def test_threads(self):
        policy, errors = adaattn.Policy(), []

        def work(number):
            try:
                for index in range(50):
                    called(policy, layer=str(index % 3), error=0.004 + 0.001 * (number % 2))
                    policy.to_json(), policy.describe(), policy.statistics()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert policy.statistics().calls == 200


class TestFiles:
    def policy(self):
        policy = adaattn.Policy()
        called(policy, form=np.array([[1, 0]]), screen=np.array([[-np.inf, -1]]))
        called(policy, layer="b", heads=3)
        return policy

    def test_same_after_loading(self, tmp_path):
        policy = self.policy()
        policy.save(tmp_path / "policy.json")
        loaded = adaattn.Policy.load(tmp_path / "policy.json")
        assert loaded.to_json() == policy.to_json()
        assert "Infinity" not in loaded.to_json()
        assert loaded.plan("a", TOKENS) == policy.plan("a", TOKENS)
        assert list(tmp_path.iterdir()) == [tmp_path / "policy.json"]
        assert called(loaded, layer="b", heads=3).form.tolist() == [["tiled"] * 3]

    def test_copies(self):
        policy = self.policy()
        assert copy.deepcopy([policy])[0] is policy
        assert pickle.loads(pickle.dumps(policy)).to_json() == policy.to_json()

    def test_a_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        policy, path = self.policy(), tmp_path / "policy.json"
        policy.save(path)
        before = path.read_text()
        monkeypatch.setattr(policy_module.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            policy.save(path)
        assert path.read_text() == before
        assert list(tmp_path.iterdir()) == [path]

    def changed(self, change):
        values = json.loads(self.policy().to_json())
        change(values)
        return json.dumps(values)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.update(version=2), "has version 2"),
            (lambda v: v.update(version="1"), "has version '1'"),
            (lambda v: v.update(version=True), "has version True"),
            (lambda v: v.update(format="adaattn.plan"), "is not of the format"),
            (lambda v: v.pop("layers"), 'one field "layers"'),
            (lambda v: v.update(more=1), 'one field "layers"'),
            (lambda v: v.update(layers=[]), 'one field "layers"'),
            (lambda v: v["layers"].update(a=1), "layers['a'] must be an object"),
            (lambda v: v["layers"]["a"].update({"4095": {}}), "layers['a'] must be an object whose fields are powers"),
            (lambda v: v["layers"]["a"].update({"04096": {}}), "layers['a'] must be an object whose fields are powers"),
            (
                lambda v: v["layers"]["a"].update({"8192": 1}),
                "layers['a']['8192'] must have the fields error, guarantee",
            ),
            (lambda v: v["layers"]["a"]["4096"].pop("error"), "layers['a']['4096'] must have the fields"),
            (lambda v: v["layers"]["a"]["4096"].update(error=-1), "layers['a']['4096']: error is -1"),
            (lambda v: v["layers"]["a"]["4096"].update(error=0), "layers['a']['4096']: error is 0, must be > 0"),
            (lambda v: v["layers"]["a"]["4096"].update(error="x"), "layers['a']['4096']: error is 'x'"),
            (lambda v: v["layers"]["a"]["4096"].update(guarantee="sure"), "layers['a']['4096']: guarantee is 'sure'"),
            (lambda v: v["layers"]["a"]["4096"].update(heads=[]), "layers['a']['4096'].heads must be a list"),
            (lambda v: v["layers"]["a"]["4096"].update(heads={"0": 1}), "layers['a']['4096'].heads must be a list"),
            (
                lambda v: v["layers"]["b"]["4096"]["heads"][2].pop("trend"),
                "layers['b']['4096'].heads[2] must have the fields",
            ),
            (
                lambda v: v["layers"]["b"]["4096"]["heads"][2].update(more=1),
                "layers['b']['4096'].heads[2] must have the fields",
            ),
            *(
                (
                    lambda v, name=name, bad=bad: v["layers"]["b"]["4096"]["heads"][1].update({name: bad}),
                    f"heads[1].{name} is",
                )
                for name, bad in (
                    ("form", "fast"),
                    ("precision", None),
                    ("low_precision", 3),
                    ("pooled", 1),
                    ("rank", -1),
                    ("rank", 1.5),
                    ("rank", True),
                    ("screen", 0.1),
                    ("screen", "0"),
                    ("low", [0]),
                    ("drop", None),
                    ("drop", 1.01),
                    ("trend", "x"),
                    ("spread", -0.1),
                    ("patience", -1),
                    ("rest", None),
                    ("failures", 2**31),
                )
            ),
        ],
    )
    def test_bad_values(self, change, message, tmp_path):
        path = tmp_path / "policy.json"
        path.write_text(self.changed(change))
        with pytest.raises(ValueError, match="policy.json: ") as raised:
            adaattn.Policy.load(path)
        assert message in str(raised.value)

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
    def test_what_is_not_a_number(self, number):
        text = self.policy().to_json().replace('"drop": 0.001', f'"drop": {number}', 1)
        text = text if number in text else self.changed(lambda v: None).replace("0.0010000000474974513", number, 1)
        with pytest.raises(ValueError, match=f"holds {number}"):
            adaattn.Policy.from_json(text)

    def test_truncated(self, tmp_path):
        text = self.policy().to_json()
        for length in range(0, len(text), 97):
            with pytest.raises(ValueError, match="is not JSON"):
                adaattn.Policy.from_json(text[:length])

    def test_numbers_too_large_for_a_float(self):
        with pytest.raises(ValueError, match="trend is inf"):
            adaattn.Policy.from_json(self.changed(lambda v: None).replace('"trend": null', '"trend": 1e999', 1))


@pytest.fixture
def loop(monkeypatch):
    """A policy's calls with an engine that takes every call and reports tiled heads of 4e-3; a list of its plans."""
    plans = []
    run_call = policy_module.attention_reported

    def fake(q, *rest, plan, **options):
        result, _, _ = run_call(q, *rest, plan=plan, **options)
        plans.append(plan)
        return result, report_words(q.shape[0], q.shape[1]), np.full(4, 0.001)

    monkeypatch.setattr(policy_module, "attention_reported", fake)
    return plans


class TestCalls:
    def test_first_automatic_then_the_kept_plan(self, rng, loop):
        policy, x = adaattn.Policy(), rng.standard_normal((1, 2, 16, 8), dtype=np.float32)
        out, lse = policy.attention("a", x, x, x, error=BUDGET, return_lse=True)
        assert out.shape == x.shape
        assert lse.shape == x.shape[:3]
        _, metrics = policy.attention("a", x, x, x, error=BUDGET, return_metrics=True)
        assert metrics.error_budget == BUDGET
        assert [plan.form.tolist() for plan in loop] == [[["automatic"] * 2], [["tiled"] * 2]]

    def test_exact_calls_neither_use_nor_change_it(self, rng, loop):
        policy, x = adaattn.Policy(), rng.standard_normal((1, 2, 16, 8), dtype=np.float32)
        policy.attention("a", x, x, x, error=0.0)
        assert loop == []
        assert policy.layers == ()

    def test_short_calls_are_not_learned_from(self, rng):
        policy, x = adaattn.Policy(), rng.standard_normal((1, 2, 16, 8), dtype=np.float32)
        policy.attention("a", x, x, x, error=BUDGET)  # an exact kernel takes it
        assert policy.layers == ()
        assert policy.statistics().calls == 0

    def test_bad_arguments(self, rng):
        policy, x = adaattn.Policy(), rng.standard_normal((1, 2, 16, 8), dtype=np.float32)
        with pytest.raises(TypeError, match="a policy keeps plans of its own"):
            policy.attention("a", x, x, x, error=BUDGET, plan=Plan.automatic(1, 2))
        with pytest.raises(ValueError, match="q has 3 dimensions"):
            policy.attention("a", x[0], x, x, error=BUDGET)
        with pytest.raises(TypeError, match="q is of type NoneType"):
            policy.attention("a", None, x, x, error=BUDGET)
        with pytest.raises(ValueError, match="error is -1"):
            policy.attention("a", x, x, x, error=-1)
        with pytest.raises(TypeError, match="layer is of type NoneType, must be a torch module, a str or an int"):
            policy.attention(None, x, x, x, error=BUDGET)


class TestModules:
    torch = pytest.importorskip("torch")

    def encoder(self, layers=3, heads=2):
        layer = self.torch.nn.TransformerEncoderLayer(8, heads, 8, batch_first=True, dropout=0.0)
        encoder = self.torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
        return encoder, self.torch.randn(1, 5, 8)

    def test_the_hook_tells_layers_apart(self, loop):
        policy = adaattn.Policy()
        encoder, x = self.encoder()
        with adaattn.enabled(error=BUDGET, policy=policy), self.torch.no_grad():
            encoder(x)
            encoder(x)
        assert policy.layers == ("0", "1", "2")
        assert [plan.form[0, 0] for plan in loop] == ["automatic"] * 3 + ["tiled"] * 3
        with self.torch.no_grad():
            encoder(x)  # not enabled
        assert len(loop) == 6

    def test_the_hook_outside_of_modules(self, loop):
        policy = adaattn.Policy()
        x = self.torch.randn(1, 2, 5, 8)
        with adaattn.enabled(error=BUDGET, policy=policy):
            self.torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert loop == []
        assert policy.layers == ()

    def test_layers_are_told_apart_after_a_failure(self, loop):
        torch = self.torch

        class Failing(torch.nn.Module):
            def forward(self, x):
                raise RuntimeError

        policy, x = adaattn.Policy(), torch.randn(1, 2, 5, 8)
        encoder, inputs = self.encoder()
        with adaattn.enabled(error=BUDGET, policy=policy), torch.no_grad():
            with pytest.raises(RuntimeError):
                torch.nn.Sequential(torch.nn.Identity(), Failing())(x)
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            assert policy.layers == ()
            encoder(inputs)
        assert policy.layers == ("0", "1", "2")

    def test_module_hooks_are_on_with_a_policy_only(self):
        from torch.nn.modules import module

        def count():
            return len(module._global_forward_hooks), len(module._global_forward_pre_hooks)

        before = count()
        with adaattn.enabled(error=BUDGET):
            assert count() == before
            with adaattn.enabled(error=BUDGET, policy=adaattn.Policy()):
                assert count() != before
            assert count() == before
        adaattn.enable(error=BUDGET, policy=adaattn.Policy())
        assert count() != before
        adaattn.disable()
        assert count() == before

    def test_a_policy_of_another_model_is_an_error(self, loop):
        policy = adaattn.Policy()
        encoder, x = self.encoder(heads=2)
        other, _ = self.encoder(heads=4)
        with self.torch.no_grad(), adaattn.enabled(error=BUDGET, policy=policy):
            encoder(x)
        policy = adaattn.Policy.from_json(policy.to_json())
        with (
            self.torch.no_grad(),
            adaattn.enabled(error=BUDGET, policy=policy),
            pytest.raises(adaattn.PolicyMismatchError, match="another model"),
        ):
            other(x)

    def test_adaptive_attention(self, loop):
        policy = adaattn.Policy()
        layer = adaattn.AdaptiveAttention(8, 2, error=BUDGET, policy=policy).eval()
        layers = [layer, copy.deepcopy(layer)]
        x = self.torch.randn(5, 1, 8)
        with self.torch.no_grad():
            for _ in range(2):
                for each in layers:
                    each(x)
        assert policy.layers == ("0", "1")
        assert [plan.form[0, 0] for plan in loop] == ["automatic"] * 2 + ["tiled"] * 2
        assert pickle.loads(pickle.dumps(layer)).policy.to_json() == policy.to_json()
        _, metrics = layer(x, return_metrics=True)
        assert metrics.guarantee == "measured"

    def test_transformers(self, loop):
        transformers = pytest.importorskip("transformers")
        from adaattn import hf

        adaattn.register_transformers()
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="adaattn").eval()
        policy, ids = adaattn.Policy(), self.torch.arange(9)[None]
        with self.torch.no_grad(), adaattn.enabled(error=BUDGET, policy=policy):
            model(ids, use_cache=False)
        assert policy.layers == ("0", "1")
        settings = hf._settings
        try:
            adaattn.register_transformers(error=BUDGET, policy=policy, guarantee="bounded")
            with self.torch.no_grad():
                model(ids, use_cache=False)
        finally:
            hf._settings = settings
        assert len(loop) == 4
        assert policy.layers == ("0", "1")
        with self.torch.no_grad():
            model(ids, use_cache=False)
        assert len(loop) == 4

    @pytest.mark.filterwarnings("ignore:Using `torch.compile")  # torch's, of the hooks that find the layer
    def test_compiled_code_runs_without_it(self, loop):
        policy, x = adaattn.Policy(), self.torch.randn(1, 2, 5, 8)

        def call(q):
            return policy.attention("a", q, q, q, error=BUDGET)

        compiled = self.torch.compile(call, fullgraph=True, backend="aot_eager")
        assert self.torch.equal(compiled(x), adaattn.attention(x, x, x))
        encoder, inputs = self.encoder(layers=1)
        with self.torch.no_grad(), adaattn.enabled(error=BUDGET, policy=policy):
            self.torch.compile(encoder, backend="aot_eager")(inputs)
        assert loop == []

    def test_calls_that_record_a_gradient_are_not_learned_from(self):
        policy, x = adaattn.Policy(), self.torch.randn(1, 2, 1024, 8, requires_grad=True)
        out = policy.attention("a", x, x, x, error=BUDGET, kernel="cpu_flash")
        out.sum().backward()
        assert x.grad is not None
        assert policy.statistics().calls == 0

    @pytest.mark.parametrize("use", ["enable", "module", "transformers"])
    def test_bad_policies(self, use):
        pytest.importorskip("transformers")
        calls = {
            "enable": lambda: adaattn.enable(policy="file.json"),
            "module": lambda: adaattn.AdaptiveAttention(8, 2, policy="file.json"),
            "transformers": lambda: adaattn.register_transformers(policy="file.json"),
        }
        with pytest.raises(TypeError, match="policy is of type str, must be an adaattn.Policy"):
            calls[use]()
        assert not adaattn.is_enabled()

    def test_bad_guarantees(self):
        pytest.importorskip("transformers")
        for call in (
            lambda: adaattn.enable(guarantee="sure"),
            lambda: adaattn.AdaptiveAttention(8, 2, guarantee="sure"),
            lambda: adaattn.register_transformers(guarantee="sure"),
        ):
            with pytest.raises(ValueError, match="guarantee is 'sure'"):
                call()


class TestEngine:
    """The loop around the real engine: 4,096 tokens, scores that are large near the diagonal alone."""

    TOKENS, DIM, ERROR = 4096, 32, 0.05

    def inputs(self, seed):
        rng = np.random.default_rng(seed)
        place = np.arange(self.TOKENS)[:, None] * 0.005 * (np.arange(self.DIM // 2) + 1)
        falling = 4 * 0.85 ** np.arange(self.DIM // 2)[:, None]  # what few dimensions can hold
        turning = (falling * np.stack([np.cos(place), np.sin(place)], -1)).reshape(1, 1, self.TOKENS, self.DIM)
        q, k, v = rng.standard_normal((3, 1, 2, self.TOKENS, self.DIM))
        return tuple(x.astype(np.float32) for x in (turning + 0.3 * q, turning + 0.3 * k, v))

    def errors(self, out, q, k, v):
        exact = adaattn.attention(q, k, v, is_causal=True)
        norms = [np.linalg.norm(x.astype(np.float64), axis=(-2, -1)) for x in (out - exact, exact)]
        return norms[0] / norms[1]

    def test_the_loop(self):
        policy = adaattn.Policy()
        for seed in range(6):
            q, k, v = self.inputs(seed)
            kept = policy.plan("a", self.TOKENS) if seed else None
            out, metrics = policy.attention("a", q, k, v, is_causal=True, error=self.ERROR, return_metrics=True)
            assert (self.errors(out, q, k, v) <= self.ERROR).all()
            assert metrics.seconds["measure"] > 0
            again = metrics.heads.escalations[0] > 0
            if kept is not None:  # what the head started with is what it ran, unless it missed
                reported = metrics.heads.plan
                assert (reported.screen == kept.screen)[0, ~again].all()
                assert (reported.form == kept.form)[0, ~again].all()
        found = policy.statistics()
        assert (found.calls, found.heads) == (6, 12)
        assert found.work < 0.9
        assert found.escalated <= 2

    def test_the_loop_where_reports_are_waited_for(self, monkeypatch):
        """As on GPUs: calls without a budget ask for none, and times are not known."""
        asked = []
        reported = policy_module.attention_reported

        def counting(*args, **options):
            asked.append(args[0].shape[2])
            return reported(*args, **options)

        monkeypatch.setattr(policy_module, "waits_for_reports", lambda q: True)
        monkeypatch.setattr(policy_module, "attention_reported", counting)
        monkeypatch.setattr(policy_module, "stage_seconds", lambda times: None)
        policy = adaattn.Policy()
        q, k, v = self.inputs(0)
        short = q[:, :, :40], k[:, :, :40], v[:, :, :40]
        for inputs in ((q, k, v), short, (q, k, v)):
            policy.attention("a", *inputs, is_causal=True, error=self.ERROR)
        assert asked == [self.TOKENS] * 2
        assert policy.statistics().calls == 2
        assert policy.plan("a", self.TOKENS).form[0, 0] == "tiled"

    def test_a_plan_runs_again(self):
        q, k, v = self.inputs(0)
        options = {"is_causal": True, "error": self.ERROR, "return_metrics": True}
        out, first = adaattn.attention(q, k, v, **options)
        assert first.form in ("tiled", "mixed")
        again, second = adaattn.attention(q, k, v, plan=Plan.from_json(first.heads.plan.to_json()), **options)
        np.testing.assert_array_equal(again, out)
        assert second.heads.plan == first.heads.plan
        assert (second.heads.work < first.heads.work).all()  # nothing had to be tried

    def test_a_plan_that_is_too_loose_is_judged(self):
        q, k, v = self.inputs(0)
        zeros, names = np.zeros((1, 2), np.float32), np.full((1, 2), "float32")
        loose = Plan(np.full((1, 2), "tiled"), names, names, zeros > 0, zeros.astype(int), zeros, zeros, zeros + 1)
        out, metrics = adaattn.attention(q, k, v, is_causal=True, error=0.01, plan=loose, return_metrics=True)
        assert (metrics.heads.escalations > 0).all()
        assert (self.errors(out, q, k, v) <= 0.01).all()
        assert not (metrics.heads.plan.screen == 0).any()
