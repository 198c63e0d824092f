# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import far_apart, identical, randint, randn, unchanged

from mikernels import _triton, pairwise_topk
from mikernels.kernels.pairs import pairwise_exact, pairwise_group_max, pairwise_screen
from mikernels.kernels.pairs import pairwise_topk as launcher
from mikernels.ops.pairs.pairwise_topk import pairwise_topk_op

INTERPRETED = _triton.interpreting()
NAN, INF = float("nan"), float("inf")
N, M, D = 40, 260, 24


@pytest.fixture(autouse=True)
def screened(monkeypatch):
    """Even small problems are screened; the interpreter pays by the program."""
    monkeypatch.setattr(launcher, "LITTLE", 0)
    monkeypatch.setattr(launcher, "FEWEST", 1)
    if INTERPRETED:
        monkeypatch.setattr(pairwise_screen, "PACK", pairwise_group_max.PACK | {"ROWS": 128})


@pytest.fixture
def work(monkeypatch):
    """Counts the groups that were scored exactly, and the ranges of rows done by fp64 products."""
    done = {"groups": 0, "products": 0}
    by_products, exact_scores = launcher.by_products, launcher.exact_scores

    def products(*arguments):
        done["products"] += 1
        return by_products(*arguments)

    def scores(p, first, groups, chosen):
        done["groups"] += len(chosen)
        return exact_scores(p, first, groups, chosen)

    monkeypatch.setattr(launcher, "by_products", products)
    monkeypatch.setattr(launcher, "exact_scores", scores)
    return done


def check(
    device, a, b, k, by="abs", *, min_value=-INF, row_scale=None, col_scale=None, ranks=(None, None)
):
    """The operator is its reference, bit for bit, padding included."""
    a, b = (x[(None,) * (4 - x.dim())] for x in (a, b))
    tensors = a, b, row_scale, col_scale, *ranks
    expected = pairwise_topk_op(*tensors, k, by, min_value, False, impl="reference")
    placed = [None if t is None else t.to(device) for t in tensors]
    with unchanged(*placed):
        found = pairwise_topk_op(*placed, k, by, min_value, False, impl="triton")
    for mine, theirs in zip(found, expected, strict=True):
        assert identical(mine.cpu() + 0, theirs + 0)  # a sum of zeros has either sign


SHAPES = [(1, 1, 1, 1), (3, 70, 2, 4), (7, 65, 9, 200), (40, 260, 24, 5), (129, 200, 70, 8)]


@pytest.mark.parametrize("n, m, d, k", SHAPES)
def test_pairwise_topk_is_exact(device, dtype, n, m, d, k):
    a, b = randn(n, d, dtype=dtype), randn(m, d, dtype=dtype, seed=1)
    check(device, a, b, k, "abs" if dtype == torch.float32 else "value")


def test_pairwise_topk_of_nothing(device, dtype):
    for n, m in ((0, 5), (5, 0)):
        a, b = (torch.empty(1, 1, size, 3, dtype=dtype, device=device) for size in (n, m))
        more = None, None, None, None, 2, "abs", -INF, False
        assert [len(t) for t in pairwise_topk_op(a, b, *more, impl="triton")] == [0, 0, 0]
    for a, b in ((randn(1, 1, 3, 0), randn(1, 1, 4, 0)), (randn(0, 2, 3, 5), randn(0, 2, 4, 5))):
        placed = a.to(device, dtype), b.to(device, dtype)
        found = pairwise_topk_op(*placed, *more[:4], 5, *more[5:], impl="triton")
        assert [t.tolist() for t in found] == [[0] * 5, [0, 0, 0, 0, 1], [0, 1, 2, 3, 0]]


@pytest.mark.parametrize("by", ["abs", "value"])
def test_the_screen_decides_ordinary_pairs(device, dtype, work, by):
    """Else fp64 products would hide whatever is wrong with the screen, and all speed with it."""
    a, b = randn(N, 96, dtype=dtype), randn(M, 96, dtype=dtype, seed=1)
    scales = {"row_scale": randn(N, dtype=dtype, seed=2), "col_scale": randn(M, dtype=dtype)}
    check(device, a, b, 9, by)
    check(device, a, b, 9, by, **scales)
    assert work["products"] == 0 and work["groups"] <= 2 * 12


@pytest.mark.parametrize("by", ["abs", "value"])
def test_bounds_hold(device, by):
    """No maximum is below the exact one, or above it by more than the proof has it."""
    spread = 10.0 ** torch.linspace(-12, 12, M)[torch.randperm(M, generator=torch.Generator())]
    a, b = randn(N, 200), randn(M, 200, seed=1) * spread[:, None]
    a[3], b[5] = 0, 0
    scales = randn(N, seed=2).exp(), randn(M, seed=3)
    operands = a[None, None].to(device), b[None, None].to(device), *(s.to(device) for s in scales)
    pairs = pairwise_exact.Pairs(*operands, None, None, by == "abs")
    keys = pairwise_screen.Screen(pairs).maxima(0, N).cpu()
    bounds = torch.where(keys < 0, ~keys | -(2**31), keys).view(torch.float32).double()
    left, right = a.double() * scales[0].double()[:, None], b.double() * scales[1].double()[:, None]
    scores, size = left @ right.T, left.norm(dim=1)[:, None] * right.norm(dim=1)
    strengths = scores.abs() if by == "abs" else scores
    for group, bound in enumerate(bounds.T):
        columns = slice(group * 64, group * 64 + 64)
        assert (bound >= strengths[:, columns].amax(1)).all()
        # twice the slack: 2^-12 of either side's fp16, and the sum of 200 products
        slack = 1.1 * (2**-11 + 256 * 2**-23)
        most = strengths[:, columns] + 2 * slack * size[:, columns]
        assert (bound <= most.amax(1) + 2.0**-48 * size.max()).all()


def duplicates(x, first):
    x[first:] = x[: len(x) - first]


def put(x, value, *places):
    for place in places:
        x[place] = value


# each writes into a [N, D] and b [M, D], of normal numbers
HOSTILE = {
    "constant": lambda a, b: (a.fill_(1), b.fill_(-1)),
    "zero": lambda a, b: a.zero_(),
    "mostly zero": lambda a, b: (a[::2].zero_(), b[3:].zero_()),
    "fewer than k are not zero": lambda a, b: (a[6:].zero_(), put(b.zero_(), 1, (100, 3))),
    "duplicate rows and columns": lambda a, b: (duplicates(a, 20), duplicates(b, 130)),
    "nan in a row": lambda a, b: put(a, NAN, (7, 3)),
    "nan in a column": lambda a, b: put(b, NAN, (200, 3)),
    "nan everywhere": lambda a, b: a.fill_(NAN),
    "inf rows": lambda a, b: (put(a, INF, (7, 3)), put(a, -INF, (9, 3))),
    "inf times 0": lambda a, b: (put(b, INF, (200, 3), (70, 3)), a[:5, 3].zero_()),
    "-inf everywhere": lambda a, b: (a.fill_(-INF), b.abs_()),
    "overflow": lambda a, b: (a.mul_(1e30), b.mul_(1e30)),
    "some overflow": lambda a, b: (a.mul_(1e19), b.mul_(1e19)),
    "huge and tiny": lambda a, b: (a.mul_(1e37), b.mul_(1e-37)),
    "tiny": lambda a, b: (a.mul_(1e-18), b.mul_(1e-18)),
    "underflow": lambda a, b: (a.mul_(1e-30), b.mul_(1e-30)),
    "denormal": lambda a, b: a.mul_(1e-40),
    "denormal and huge": lambda a, b: (a.mul_(1e-43), b.mul_(1e37)),
    "spread rows": lambda a, b: a.mul_(10.0 ** torch.linspace(-30, 30, N)[:, None]),
    "an outlier": lambda a, b: a[:, 0].mul_(1e6),
    "an outlier without effect": lambda a, b: (a[:, 0].fill_(1e8), b[:, 0].zero_()),
    "cancelling": lambda a, b: (
        a[:, 12:].copy_(-a[:, :12]),
        b[:, 12:].mul_(1e-5).add_(b[:, :12]),
    ),
    "near ties": lambda a, b: b.mul_(1e-6).add_(a.abs_()[:1]),
}
QUICK = [*HOSTILE][::3] if INTERPRETED else [*HOSTILE]


@pytest.mark.parametrize("name", QUICK)
def test_pairwise_topk_hostile(device, name):
    a, b = randn(N, D), randn(M, D, seed=1)
    HOSTILE[name](a, b)
    check(device, a, b, 3)
    check(device, a, b, 9, "value")


@pytest.mark.parametrize("by", ["abs", "value"])
def test_pairwise_topk_ties(device, by):
    a, b = randint(N, D), randint(M, D, seed=1)
    for k in (2, 11):
        check(device, a, b, k, by)
    check(device, a, b, 11, by, min_value=30.0)
    check(device, a, b, 400, by, min_value=30.0)


def test_near_ties_that_fp16_cannot_tell_apart(device, work):
    """Scores differ by 10^-6 of themselves, bounds by 5 10^-4: the next digits decide."""
    direction = randn(1, D).abs()
    a = direction.repeat(N, 1)
    b = direction * (1 + 1e-6 * torch.rand(M, 1, generator=torch.Generator().manual_seed(0)))
    check(device, a, b, 5)
    assert work["products"] == 1 and work["groups"] > 0


def test_pairwise_topk_min_value(device):
    a, b = randn(N, D), randn(M, D, seed=1)
    for least in (17.0, INF):
        check(device, a, b, 7, min_value=least)
        check(device, a, b, 7, "value", min_value=-least)


def test_pairwise_topk_scales(device, dtype):
    a, b = randn(N, D, dtype=dtype), randn(M, D, dtype=dtype, seed=1)
    rows, cols = randn(N, dtype=dtype, seed=2), randn(M, dtype=dtype, seed=3)
    rows[::3], cols[5:] = 0, 0
    check(device, a, b, 6, row_scale=rows, col_scale=cols)
    rows[3], rows[4], a[4, 2] = NAN, INF, 0
    check(device, a, b, 6, "value", row_scale=rows)
    # masked lanes hold zeros, and 0 inf is NaN
    check(device, a[5:].abs(), b.abs(), 6, row_scale=torch.cat([rows[4:5], rows[6:]]))


def test_scales_of_any_magnitude(device):
    a, b = randn(N, D), randn(M, D, seed=1)
    rows, cols = (10.0 ** torch.linspace(-38, 38, n) * randn(n, seed=n).sign() for n in (N, M))
    check(device, a, b, 5, "value", row_scale=rows, col_scale=cols.flip(0))
    check(device, a, b, 5, row_scale=rows[:1].expand(N), col_scale=cols)


@pytest.mark.parametrize("by", ["abs", "value"])
def test_pairwise_topk_ranks(device, by):
    a, b = randn(N, D), randn(M, D, seed=1)
    a[7, 3] = NAN
    rows, cols = torch.arange(N), torch.arange(M)
    check(device, a, b, 7, by, ranks=(rows, cols))
    check(device, a, b, 17, by, ranks=(rows + M - 5, cols))  # ten pairs
    check(device, a, b, 3, by, ranks=(rows + M, cols))  # none
    a, b = randn(200, D), randn(M, D, seed=1)
    check(device, a, b, 5, by, ranks=(-torch.arange(200), -cols))  # whole tiles are left out


def test_pairwise_topk_sums_over_examples_and_positions(device, dtype):
    a, b = randn(2, 3, N, 29, dtype=dtype), randn(2, 3, M, 29, dtype=dtype, seed=1)
    check(device, a, b, 3)
    check(device, a[:, :1], b[:, :1], 3, "value")
    # the definition in blocks takes (example, position) many at a time too
    check(device, a, b, 2000)
    check(device, a[:, :1], b[:, :1], 2000)


def test_pairwise_topk_layouts(device):
    a, b = randn(1, 2, 2 * N, 3 * D).to(device), randn(1, 2, D, M, seed=1).to(device)
    given = a[:, :, ::2, ::3], b.transpose(2, 3), None, None, None, None, 5, "abs", -INF, False
    compare = [t.cpu().contiguous() if isinstance(t, torch.Tensor) else t for t in given]
    expected = pairwise_topk_op(*compare, impl="reference")
    for mine, theirs in zip(pairwise_topk_op(*given, impl="triton"), expected, strict=True):
        assert identical(mine.cpu(), theirs)
    check(device, randn(N, D), randn(1, D, seed=1).expand(M, D), 5)
    check(device, randn(1, N, D)[:, None].expand(3, 2, N, D), randn(3, 2, M, D, seed=1), 5)


def test_long_rows_in_chunks(device, monkeypatch, work):
    monkeypatch.setattr(pairwise_screen, "CHUNK", 64)
    check(device, randn(N, 150), randn(M, 150, seed=1), 2)  # parts of a row
    a, b = randn(2, 3, N, 29), randn(2, 3, M, 29, seed=1)
    check(device, a, b, 2, "value", ranks=(torch.arange(N), torch.arange(M)))  # pairs of segments
    monkeypatch.setattr(pairwise_screen, "SUMS", 4 * 128 * 128)
    check(device, randn(200, 70), randn(M, 70, seed=1), 3)  # panels of both sides
    assert work["products"] == 0


def test_panels_and_blocks(device, monkeypatch, work):
    """Scratch for 128 rows and columns at a time: panels know what earlier ones found."""
    monkeypatch.setattr(pairwise_screen, "PACKED", 128 * 2 * 64)
    monkeypatch.setattr(launcher, "AT_ONCE", 3)
    a, b = randn(240, 29), randn(M, 29, seed=1)
    check(device, a, b, 7)
    assert work["products"] == 0 and work["groups"] < 40
    for module in (launcher, pairwise_exact):
        monkeypatch.setattr(module, "PAIRS", 1 << 10)
    check(device, a[:140].round(), b.round(), 30)
    check(device, a[:60], b, 700)
    assert work["products"] > 0


def test_panels_begin_anew(device):
    """What is known of rows is not carried over to those that take their place."""
    a, b = randn(1, 1, 80, 29).to(device), randn(1, 1, M, 29, seed=1).to(device)
    a[0, 0, :40] *= 1e3
    a[0, 0, 40] = 0
    pairs = pairwise_exact.Pairs(a, b, None, None, None, None, True)
    screen = pairwise_screen.Screen(pairs)
    screen.maxima(0, 40)
    expected = pairwise_screen.Screen(pairs).maxima(40, 80)
    assert torch.equal(screen.maxima(40, 80), expected)


def test_nan_ends_the_search(device, monkeypatch):
    """k of NaN come before whatever follows: later panels are not looked at."""
    monkeypatch.setattr(pairwise_screen, "PACKED", 128 * 2 * 64)
    seen = []
    maxima = pairwise_screen.Screen.maxima

    def spy(self, first, last):
        seen.append(first)
        return maxima(self, first, last)

    monkeypatch.setattr(pairwise_screen.Screen, "maxima", spy)
    a = randn(300, 9)
    a[20, 4] = NAN
    check(device, a, randn(M, 9, seed=1), 5)
    assert seen == [0]


def test_pairwise_topk_beyond_2_to_the_31_elements(device, monkeypatch, work):
    # of two rows, exact scores of both groups
    monkeypatch.setattr(launcher, "SHARE", 0.25)
    a, b = randn(2, 20).half().to(device), randn(2, 20, seed=1).half().to(device)
    more = None, None, None, None, 3, "abs", -INF, False
    near = pairwise_topk_op(a[None, None], b[None, None], *more, impl="triton")
    for left, right in ((far_apart(a), b), (a, far_apart(b))):
        far = pairwise_topk_op(left[None, None], right[None, None], *more, impl="triton")
        assert all(identical(x, y) for x, y in zip(near, far, strict=True))
    # positions that far apart, on both sides
    given = (far_apart(x)[None, :, None] for x in (a, b))
    values = pairwise_topk_op(*given, *more[:4], 1, *more[5:], impl="triton")[0]
    exact = (a.double() * b.double()).sum()
    torch.testing.assert_close(values, exact.float().reshape(1), rtol=0, atol=0)
    assert work["products"] == 0


def test_pairwise_topk_of_one_set(device):
    a = randn(100, D)
    for options in ({"upper": True}, {"upper": True, "min_value": 14.0}, {}):
        expected = pairwise_topk(a, k=6, **options, impl="reference")
        found = pairwise_topk(a.to(device), k=6, **options, impl="triton")
        assert found.shape == expected.shape
        for name in ("values", "rows", "cols"):
            assert identical(getattr(found, name).cpu(), getattr(expected, name))


def test_pairwise_topk_is_deterministic(device):
    a, b = randint(N, D).to(device), randint(M, D, seed=1).to(device)
    first = pairwise_topk(a, b, k=8, impl="triton")
    for _ in range(1 if INTERPRETED else 20):
        again = pairwise_topk(a, b, k=8, impl="triton")
        assert identical(first.values, again.values)
        assert torch.equal(first.rows, again.rows) and torch.equal(first.cols, again.cols)
