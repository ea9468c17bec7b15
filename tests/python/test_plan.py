"""adaattn.Plan: what it holds, its table and its JSON, how it reaches the C library, and what it refuses."""

import ctypes
import json

import adaattn
import numpy as np
import pytest
from adaattn import _calls
from adaattn.plan import FORMS, PRECISIONS, RECORD

BATCH, HEADS = 2, 3


def plan_of_all_kinds():
    """One head of each form, and a dense one."""
    return adaattn.Plan(
        form=[["tiled", "low_rank", "dense"], ["automatic", "tiled", "dense"]],
        precision=[["bfloat16", "float32", "float16"], ["float32", "float32", "float8"]],
        low_precision=[["int8", "float32", "float16"], ["float32", "float32", "float8"]],
        pooled=[[True, False, False], [False, False, False]],
        rank=[[0, 128, 0], [0, 0, 0]],
        screen=[[-3.5, 0, 0], [0, -np.inf, 0]],
        low=[[-1.25, 0, 0], [0, -np.inf, 0]],
        drop=[[0.003, 0, 0], [0, 0.125, 0]],
    )


def inputs(rng, tokens=1024, dim=8):
    return rng.standard_normal((3, BATCH, HEADS, tokens, dim), dtype=np.float32)


@pytest.fixture
def passed(monkeypatch):
    """The plans that reach the C library, one (B, Hq) record array or None a call."""
    seen = []
    forward = _calls.forward

    def spy(*args, **masses):
        address, (b, h) = args[12], args[0][3:5]  # plans and the shape of q
        size = b * h * RECORD.itemsize
        seen.append(np.frombuffer(ctypes.string_at(address, size), RECORD).reshape(b, h) if address else None)
        forward(*args, **masses)

    monkeypatch.setattr(_calls, "forward", spy)
    return seen


class TestValue:
    def test_records_are_the_c_structs_and_back(self):
        plan = plan_of_all_kinds()
        records = plan.records(BATCH, HEADS)
        assert records["form"].tolist() == [[1, 2, 0], [-1, 1, 0]]
        assert records["precision"].tolist() == [[2, 0, 1], [0, 0, 4]]
        assert records["low_precision"][0, 0] == 3
        assert records["pooled"].tolist() == [[1, 0, 0], [0, 0, 0]]
        assert records["rank"][0, 1] == 128
        assert records["screen"][1, 1] == -np.inf
        assert records["drop"][0, 0] == np.float32(0.003)
        assert adaattn.Plan.from_records(records) == plan

    def test_json_gives_the_same(self, tmp_path):
        plan = plan_of_all_kinds()
        assert adaattn.Plan.from_json(plan.to_json()) == plan
        text = plan.to_json(indent=2)
        assert "Infinity" not in text  # which is not JSON
        assert json.loads(text)["screen"] == [[-3.5, 0, 0], [0, None, 0]]
        plan.save(tmp_path / "plan.json")
        assert adaattn.Plan.load(tmp_path / "plan.json") == plan

    def test_every_name_goes_through_the_struct(self):
        for index, form in enumerate(FORMS):
            for code, precision in enumerate(PRECISIONS):
                part = {name: [[0.0]] for name in ("screen", "low", "drop")} | {"rank": [[0]], "pooled": [[False]]}
                plan = adaattn.Plan(form=[[form]], precision=[[precision]], low_precision=[[precision]], **part)
                record = plan.records(1, 1)[0, 0]
                assert record["form"] == (-1 if form == "automatic" else index)
                assert record["precision"] == record["low_precision"] == code

    def test_equality_is_by_value(self):
        plan = plan_of_all_kinds()
        assert plan == plan_of_all_kinds()
        assert plan != adaattn.Plan.automatic(BATCH, HEADS)
        assert plan != "plan"

    def test_it_cannot_be_changed(self):
        with pytest.raises(ValueError, match="read-only"):
            plan_of_all_kinds().screen[0, 0] = 0

    def test_table(self):
        lines = plan_of_all_kinds().describe().splitlines()
        assert len(lines) == 1 + BATCH * HEADS
        assert lines[0].split()[:4] == ["batch", "head", "form", "precision"]
        assert lines[1].split() == ["0", "0", "tiled", "bfloat16", "int8", "pooled", "3.0e-02", "2.9e-01", "3.0e-03"]
        assert lines[2].split() == ["0", "1", "low_rank", "float32", "128"]
        assert lines[3].split() == ["0", "2", "dense", "float16"]
        assert lines[4].split() == ["1", "0", "automatic"]
        assert lines[5].split() == ["1", "1", "tiled", "float32", "none", "none", "none", "1.2e-01"]

    def test_no_heads(self):
        plan = adaattn.Plan.automatic(0, 4)
        assert adaattn.Plan.from_json(plan.to_json()).shape == (0, 0)  # lists of nothing have no inner length
        assert plan.records(0, 4).shape == (0, 4)
        assert plan.describe().splitlines()[0].startswith("batch")


class TestCalls:
    def test_plans_reach_the_library(self, rng, passed):
        q, k, v = inputs(rng)
        plan = adaattn.Plan.automatic(BATCH, HEADS)
        adaattn.attention(q, k, v, error=0.1)
        adaattn.attention(q, k, v, error=0.1, plan=plan)
        assert passed[0] is None
        np.testing.assert_array_equal(passed[1], plan.records(BATCH, HEADS))

    def test_one_batch_entry_serves_all(self, rng, passed):
        q, k, v = inputs(rng)
        plan = adaattn.Plan.from_records(plan_of_all_kinds().records(BATCH, HEADS)[:1])
        adaattn.attention(q, k, v, error=0.1, plan=plan)
        assert adaattn.Plan.from_records(passed[0][:1]) == plan
        assert adaattn.Plan.from_records(passed[0][1:]) == plan

    def test_torch_passes_the_same(self, rng, passed):
        torch = pytest.importorskip("torch")
        q, k, v = map(torch.from_numpy, inputs(rng))
        plan = plan_of_all_kinds()
        out = adaattn.attention(q, k, v, error=0.1, plan=plan)
        adaattn.attention(q, k, v, error=0.1, plan=plan, return_metrics=True)
        for records in passed:
            np.testing.assert_array_equal(records, plan.records(BATCH, HEADS))
        assert out.shape == q.shape
        # Calls that record a gradient run exactly, and follow no plan.
        adaattn.attention(q.requires_grad_(), k, v, error=0.1, plan=plan)
        assert passed[-1] is None

    def test_compiled_code_takes_plans(self, rng, passed):
        torch = pytest.importorskip("torch")
        q, k, v = map(torch.from_numpy, inputs(rng))
        plan = adaattn.Plan.from_records(plan_of_all_kinds().records(BATCH, HEADS)[:1])

        def call(q, k, v):
            return adaattn.attention(2 * q, k, v, error=0.1, guarantee="bounded", plan=plan, kernel="cpu_flash")

        out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
        assert torch.equal(out, call(q, k, v))
        assert len(passed) == 2
        np.testing.assert_array_equal(passed[0], plan.records(BATCH, HEADS))

    def test_a_call_reports_a_plan_that_runs_again(self, rng):
        q, k, v = inputs(rng)
        options = {"error": 0.1, "kernel": "cpu_adaptive"}
        out, metrics = adaattn.attention(q, k, v, return_metrics=True, **options)
        plan = metrics.heads.plan
        assert plan.shape == (BATCH, HEADS)
        assert not (plan.form == "automatic").any()
        np.testing.assert_array_equal(metrics.heads.forms, plan.form)
        again = adaattn.attention(q, k, v, plan=plan, **options)
        np.testing.assert_allclose(again, out, atol=0.2)
        assert json.loads(metrics.to_json())["heads"]["forms"] == plan.form.tolist()


class TestBadPlans:
    @pytest.mark.parametrize(
        ("field", "value", "error", "message"),
        [
            ("form", [["fast"] * 3] * 2, ValueError, "form holds 'fast', must be one of dense, tiled"),
            ("precision", [["int4"] * 3] * 2, ValueError, "precision holds 'int4'"),
            ("low_precision", [[3] * 3] * 2, ValueError, "low_precision holds 3"),
            ("pooled", [[1] * 3] * 2, TypeError, "pooled has dtype int64, must be bool"),
            ("rank", [[1.5] * 3] * 2, TypeError, "rank has dtype float64, must be integers"),
            ("rank", [[-1] * 3] * 2, ValueError, "rank holds -1"),
            ("rank", [[2**31] * 3] * 2, ValueError, "rank holds 2147483648"),
            ("screen", [[0.5] * 3] * 2, ValueError, "screen holds 0.5, must be a natural log <= 0"),
            ("screen", [[float("nan")] * 3] * 2, ValueError, "screen holds nan"),
            ("low", [["0"] * 3] * 2, TypeError, "low has dtype"),
            ("drop", [[1.5] * 3] * 2, ValueError, "drop holds 1.5, must be a share, 0 to 1"),
            ("drop", [[float("-inf")] * 3] * 2, ValueError, "drop holds -inf"),
            ("drop", [[0.1] * 4] * 2, ValueError, "drop has shape (2, 4), must be that of form, (2, 3)"),
            ("screen", [0.0, 0.0], ValueError, "screen has shape (2,), must be (batch, heads)"),
        ],
    )
    def test_fields(self, field, value, error, message):
        good = plan_of_all_kinds()
        fields = {name: getattr(good, name) for name in good.to_dict()}
        with pytest.raises(error) as raised:
            adaattn.Plan(**{**fields, field: value})
        assert str(raised.value).startswith(message)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is not JSON"),
            (plan_of_all_kinds().to_json()[:-20], "is not JSON"),
            ("[1]", 'is not of the format "adaattn.plan": its field "format" is None'),
            ('{"format": "adaattn.policy"}', "its field \"format\" is 'adaattn.policy'"),
            ('{"format": "adaattn.plan", "version": 2}', "has version 2"),
            ('{"format": "adaattn.plan", "version": 1}', "plan lacks field drop, form"),
            (plan_of_all_kinds().to_json().replace('"rank"', '"runk"'), "plan lacks field rank"),
            (plan_of_all_kinds().to_json()[:-1] + ', "more": 1}', "plan has the unknown field more"),
            (plan_of_all_kinds().to_json().replace("-3.5", "NaN"), "holds NaN"),
            (plan_of_all_kinds().to_json().replace("-3.5", "3.5"), "screen holds 3.5"),
            (plan_of_all_kinds().to_json().replace('"tiled", "low_rank"', '"tiled"'), "form is ragged"),
        ],
    )
    def test_files(self, text, message, tmp_path):
        path = tmp_path / "plan.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path}: ") as raised:
            adaattn.Plan.load(path)
        assert message in str(raised.value)

    def test_files_that_are_not_text(self, tmp_path):
        (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="plan.json: .*utf-8"):
            adaattn.Plan.load(tmp_path / "plan.json")
        with pytest.raises(FileNotFoundError):
            adaattn.Plan.load(tmp_path / "none.json")

    @pytest.mark.parametrize("shape", [(1, HEADS + 1), (BATCH + 1, HEADS), (3, 1)])
    def test_other_shapes(self, rng, shape):
        q, k, v = inputs(rng, tokens=16)
        with pytest.raises(ValueError, match="plan is for .* of . heads?, but q has 2 batch entries of 3 heads"):
            adaattn.attention(q, k, v, error=0.1, plan=adaattn.Plan.automatic(*shape))

    def test_other_types_and_exact_calls(self, rng):
        q, k, v = inputs(rng, tokens=16)
        with pytest.raises(TypeError, match="plan is of type dict, must be an adaattn.Plan"):
            adaattn.attention(q, k, v, error=0.1, plan={})
        with pytest.raises(ValueError, match="plan is given, but error is 0"):
            adaattn.attention(q, k, v, plan=adaattn.Plan.automatic(BATCH, HEADS))

    def test_the_operator_checks_plans(self, rng):
        torch = pytest.importorskip("torch")
        from adaattn import torch_op
        from adaattn._options import CallOptions

        q, k, v = map(torch.from_numpy, inputs(rng, tokens=16))
        good = torch.tensor(adaattn.Plan.automatic(BATCH, HEADS).words(BATCH, HEADS), dtype=torch.int32)
        for bad in (good[:1], good.float(), good.transpose(0, 1).contiguous().transpose(0, 1), good[..., :7]):
            with pytest.raises(ValueError, match="^plans is"):
                torch_op.forward_reported_op(q, k, v, None, None, *CallOptions(error=0.1), bad)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_guarantee(rng, library):
    q, k, v = inputs(rng, tokens=1024)
    if library == "torch":
        q, k, v = map(pytest.importorskip("torch").from_numpy, (q, k, v))
    _, metrics = adaattn.attention(q, k, v, error=0.1, guarantee="bounded", return_metrics=True)
    assert metrics.guarantee == "bounded"
    # Whatever took it: bounds of heads that are not exact are below the budget.
    inexact = metrics.heads.forms != "dense"
    assert (metrics.heads.error_bound[inexact] <= 0.1).all()
    for bad in ("sure", None, 1):
        with pytest.raises(ValueError, match='guarantee is .*, must be "measured" or "bounded"'):
            adaattn.attention(q, k, v, error=0.1, guarantee=bad)
    kernels = adaattn.describe(q, k, v, error=0.1, guarantee="bounded")["kernels"]
    measured = adaattn.describe(q, k, v, error=0.1, guarantee="measured")["kernels"]
    assert kernels != measured  # the guarantee reaches the table


def test_metrics_of_an_exact_call(rng):
    q, k, v = inputs(rng, tokens=16, dim=8)
    _, metrics = adaattn.attention(q, k[:, :, :5], v[:, :, :5], return_metrics=True)
    assert metrics.avg_rank == 5  # of 16 x 5 scores from 8 dimensions
    assert metrics.work == 1
    assert metrics.compute_precision == "float32"
    assert set(metrics.seconds) == {"measure", "plan", "attend", "verify"}
    assert metrics.seconds["measure"] == metrics.seconds["plan"] == metrics.seconds["verify"] == 0
    heads = json.loads(metrics.to_json())["heads"]
    assert heads["error_bound"] == [[None] * HEADS] * BATCH  # inf is not JSON
    assert set(heads) >= {"low_tiles", "pooled_tiles", "saturated", "precision", "screen"}
    _, metrics = adaattn.attention(*(x[:0] for x in (q, k, v)), return_metrics=True)
    assert np.isnan(metrics.work)
    assert np.isnan(metrics.avg_rank)


def test_times_that_are_not_known():
    """Those of GPUs."""
    from adaattn.metrics import stage_seconds

    assert stage_seconds(np.full(4, np.nan)) is None
    assert stage_seconds(np.arange(4.0)) == {"measure": 0, "plan": 1, "attend": 2, "verify": 3}


def test_precisions_and_rank_of_what_ran():
    from adaattn._library import HEAD_REPORT_WORDS, HeadReport
    from adaattn.metrics import HeadReports, average_rank

    words = np.zeros((BATCH, HEADS, HEAD_REPORT_WORDS), np.int64)
    records = words.view(np.dtype(HeadReport))[..., 0]
    records["plan"] = plan_of_all_kinds().records(BATCH, HEADS)
    records["plan"]["form"][1, 0] = 1  # a report holds no automatic head
    records["high_tiles"], records["low_tiles"] = 5, 3
    heads = HeadReports.from_words(words)
    assert heads.form == "mixed"
    assert heads.precisions == ("float32", "float16", "bfloat16", "int8", "float8")
    assert average_rank(heads, BATCH * HEADS, 64) == (5 * 64 + 128) / 6
    records["high_tiles"][0, 0] = records["low_tiles"][0, 0] = 0  # neither its bfloat16 nor its int8 ran
    assert HeadReports.from_words(words).precisions == ("float32", "float16", "float8")
