"""Bucket plans: pure, complete, one bucket a step, few executables (design: data.md 11)."""

import collections
import csv
import itertools
import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.presets import internvlx_2b, internvlx_8b
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.buckets import (
    LENGTH_STEP,
    TILE_BUCKETS,
    BatchRule,
    Bucket,
    SlotCosts,
    assign_buckets,
    smallest_bucket,
    trim_buckets,
)
from internvlx_jax.data.packing import best_fit, fill_rows
from internvlx_jax.data.plan import EntryStream, PackedStream, Plan
from internvlx_jax.data.tiles import tile_count
from internvlx_jax.models.flops import slot_flops

TOKENS = 8192
RULE = BatchRule(row_quantum=4, tokens=TOKENS)


def samples(seed: int, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """(tile counts, token lengths) of a mix of text, one-image and multi-image samples."""
    rng = np.random.default_rng(seed)
    tiles = rng.choice(
        [0, 1, 2, 3, 4, 5, 7, 9, 20, 30], n, p=[0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.06, 0.03, 0.01]
    )
    return tiles, tiles * 16 + rng.integers(8, 700, n)


def bucket_plan(tiles, lengths, *, seed=1, epochs=None, rates=(1, 1), rule=RULE, near=0) -> Plan:
    """Two datasets, even samples and odd ones."""
    buckets, code = assign_buckets(tiles, lengths, max_executables=10)
    numbers = np.arange(len(tiles))
    streams = [
        EntryStream(
            seed,
            b,
            {d: found for d in (0, 1) if len(found := numbers[(code == b) & (numbers % 2 == d)])},
            [Fraction(rate) for rate in rates],
        )
        for b in range(len(buckets))
    ]
    return Plan(
        buckets,
        [rule.rows(bucket) for bucket in buckets],
        streams,
        seed=seed,
        epochs=epochs,
        near=near,
    )


def packed_plan(
    tiles, lengths, *, seed=1, epochs=None, rates=(1, 1), rule=RULE, known=(0, 0)
) -> Plan:
    bucket, numbers = Bucket(40, 2048), np.arange(len(tiles))
    entries = EntryStream(
        seed, 0, {d: numbers[numbers % 2 == d] for d in (0, 1)}, [Fraction(rate) for rate in rates]
    )
    stream = PackedStream(entries, tiles, lengths, bucket=bucket, open_rows=16, known=known)
    return Plan([bucket], [rule.rows(bucket)], [stream], seed=seed, epochs=epochs, near=known[0])


PLANS = pytest.mark.parametrize("make", [bucket_plan, packed_plan])


def entries(steps):
    return [sample for step in steps for row in step.rows for sample in row]


def epoch(plan, number):
    return [plan.step(step) for step in range(plan.first_step(number), plan.first_step(number + 1))]


@pytest.mark.parametrize(
    "tiles, length, bucket",
    [
        (0, 1, (0, 128)),
        (0, 128, (0, 128)),
        (0, 129, (0, 256)),
        (1, 300, (1, 384)),
        (2, 10, (3, 128)),
        (7, 1900, (7, 1920)),
        (9, 10, (9, 128)),
        (14, 10, (16, 128)),
        (24, 10, (24, 128)),
        (25, 10, (32, 128)),
    ],
)
def test_the_smallest_bucket_of_a_sample(tiles, length, bucket):
    assert smallest_bucket(tiles, length) == Bucket(*bucket)


@PLANS
@pytest.mark.parametrize("epochs", [1, 3])
def test_each_sample_comes_once_an_epoch(make, epochs):
    plan = make(*samples(0), epochs=epochs)
    found = collections.Counter(entries(plan.step(step) for step in range(plan.total)))
    assert set(found) == {(sample, cycle) for sample in range(500) for cycle in range(epochs)}
    assert set(found.values()) == {1}


@PLANS
def test_every_step_has_one_bucket_and_only_the_remainder_is_masked(make):
    tiles, lengths = samples(0)
    plan = make(tiles, lengths, epochs=2)
    steps = [plan.step(number) for number in range(plan.total)]
    assert [step.number for step in steps] == list(range(plan.total))
    for step in steps:
        assert len(step.rows) == RULE.rows(step.bucket)
        for row in step.rows:
            shape = (
                np.array([(tiles[sample.sample], lengths[sample.sample]) for sample in row])
                .reshape(-1, 2)
                .sum(0)
            )
            assert shape[0] <= step.bucket.tiles and shape[1] <= step.bucket.length
            assert len(row) <= 1 or make is packed_plan
    whole, rest = steps[: plan.first_step(2)], steps[plan.first_step(2) :]
    assert all(all(step.rows) for step in whole), "what an epoch leaves over begins the next one"
    assert len({step.bucket for step in rest}) == len(rest) and (rest or make is packed_plan)


@PLANS
def test_a_remainder_begins_the_next_epoch(make):
    """The bucket of one sample fills a step of four rows after four epochs."""
    tiles, lengths = np.array([0] * 9 + [7]), np.array([1900] * 9 + [2000])
    plan = make(tiles, lengths)
    seen = [sample for number in range(4) for sample in entries(epoch(plan, number))]
    counts = collections.Counter(sample for sample, _ in seen)
    assert counts[9] == 4 and all(3 <= counts[sample] <= 4 for sample in range(9))
    for sample in range(10):
        assert [cycle for found, cycle in sorted(seen) if found == sample] == list(
            range(counts[sample])
        )


def test_rows_are_whole_quanta_and_keep_steps_near_tokens_per_step():
    for quantum in (1, 4, 6):
        rule = BatchRule(row_quantum=quantum, tokens=TOKENS)
        for length in range(LENGTH_STEP, 4096 + 1, LENGTH_STEP):
            rows = rule.rows(Bucket(1, length))
            assert rows % quantum == 0
            assert rows == quantum or TOKENS - quantum * length < rows * length <= TOKENS


def test_tiles_per_step_bounds_the_rows():
    rule = BatchRule(row_quantum=4, tokens=TOKENS, tiles=64)
    assert rule.rows(Bucket(7, 128)) == 8  # 9 rows would hold 63 tiles, but come in fours
    assert rule.rows(Bucket(0, 128)) == 64, "text has no tiles to bound"
    assert rule.rows(Bucket(24, 128)) == 4, "never below one quantum"


def test_samples_mode_has_one_number_of_rows():
    rule = BatchRule(row_quantum=4, samples=12)
    assert {rule.rows(bucket) for bucket in (Bucket(0, 128), Bucket(7, 4096))} == {12}
    with pytest.raises(ConfigError, match="data.samples_per_step 10 is not a multiple of 4"):
        BatchRule(row_quantum=4, samples=10).rows(Bucket(0, 128))


@PLANS
def test_the_plan_is_a_pure_function(make):
    """Of its arguments, not of the steps that were asked for before, nor of global random state."""
    plan = make(*samples(0))
    stop = plan.first_step(3)
    first = [plan.step(step) for step in range(stop)]
    np.random.seed(1)
    again = pickle.loads(pickle.dumps(make(*samples(0))))
    for step in np.random.default_rng(0).permutation(stop).tolist():
        assert again.step(step) == first[step]


def test_a_resumed_packed_plan_counts_on_from_its_epoch(monkeypatch):
    plan = packed_plan(*samples(0))
    step = plan.first_step(5) + 2
    epochs = []
    pack = PackedStream._pack
    monkeypatch.setattr(
        PackedStream, "_pack", lambda self, epoch: epochs.append(epoch) or pack(self, epoch)
    )
    resumed = packed_plan(*samples(0), known=(5, plan.streams[0].before(5)))
    for number in range(step, step + 30):
        assert resumed.step(number) == plan.step(number)
    assert min(epochs) >= 4, "earlier epochs are not packed again"


@PLANS
def test_epochs_and_seeds_have_orders_of_their_own(make):
    orders = [
        tuple(sample for sample, _ in entries(epoch(make(*samples(0), seed=seed), number)))
        for seed, number in ((1, 0), (1, 1), (2, 0), (0, 1))
    ]
    assert len(set(orders)) == len(orders)


def test_steps_of_a_bucket_do_not_gather():
    plan = bucket_plan(*samples(0, 3000))
    places = collections.defaultdict(list)
    for step in epoch(plan, 0):
        places[step.bucket].append((step.number + 0.5) / plan.first_step(1))
    for found in places.values():
        if len(found) > 8:
            assert 0.25 < np.mean(found) < 0.75


@PLANS
def test_rates_say_how_often_a_data_set_comes(make):
    """Dataset 0 twice an epoch, dataset 1 two times in five epochs, each of its samples equally
    often.
    """
    plan = make(*samples(0), rates=(2, Fraction(2, 5)), epochs=5)
    found = collections.Counter(
        sample for sample, _ in entries(plan.step(step) for step in range(plan.total))
    )
    assert {count for sample, count in found.items() if sample % 2 == 0} == {10}
    odd = [found[sample] for sample in range(1, 500, 2)]
    assert set(odd) <= {1, 2, 3} and abs(sum(odd) - 500) <= len(plan.buckets)


def test_many_samples_are_planned_in_numpy():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 8, 300_000)
    lengths = tiles * 256 + rng.integers(64, 512, len(tiles))
    buckets, code = assign_buckets(tiles, lengths, 16)
    streams = [
        EntryStream(0, b, {0: np.flatnonzero(code == b)}, [Fraction(1)])
        for b in range(len(buckets))
    ]
    plan = Plan(buckets, [8] * len(buckets), streams, seed=0)
    tracemalloc.start()
    plan.step(plan.first_step(2) + 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120 * len(tiles), "bytes a sample"


# --- packing --------------------------------------------------------------------------------------


def test_best_fit_by_hand():
    tiles, lengths = np.array([1, 1, 1, 1, 5, 0]), np.array([60, 50, 40, 50, 10, 30])
    # 60 | 50 | 40 joins 60, which it fills | 50 joins the other 50 | 10 has too many tiles for any
    # | 30 joins 10
    rows = best_fit(lengths, 100, also=[(tiles, 6)], open_rows=4)
    assert rows.tolist() == [0, 1, 0, 1, 2, 2]


def test_best_fit_prefers_the_oldest_of_equals_and_closes_the_fullest():
    lengths = np.array([60, 60, 40])
    assert best_fit(lengths, 100, open_rows=4).tolist() == [0, 1, 0]
    lengths = np.array([70, 60, 90, 10, 35])
    # Two open rows: 90 closes the row of 70; 10 fills the row of 90; 35 joins 60.
    assert best_fit(lengths, 100, open_rows=2).tolist() == [0, 1, 2, 2, 1]


def test_best_fit_against_a_plain_loop():
    tiles, lengths = samples(3, 400)
    rows = best_fit(lengths, 1500, also=[(tiles, 30), (lengths - 10 * tiles, 900)], open_rows=5)
    expected, open_, count = (
        [],
        [],
        0,
    )  # open rows: [free tokens, free tiles, free short slots, number]
    for t, n in zip(tiles, lengths):
        fitting = [row for row in open_ if row[0] >= n and row[1] >= t and row[2] >= n - 10 * t]
        if not fitting:
            if len(open_) == 5:
                open_.remove(min(open_, key=lambda row: (row[0], row[3])))
            open_.append([1500, 30, 900, count])
            count += 1
            fitting = open_[-1:]
        best = min(fitting, key=lambda row: (row[0], row[3]))
        best[:3] = best[0] - n, best[1] - t, best[2] - (n - 10 * t)
        expected.append(best[3])
    assert rows.tolist() == expected


def check_rows(rows, tiles, lengths, bucket, saved_per_tile=0):
    """Every sample has a row, and every row fits; returns token and tile slots per row."""
    tokens, slots = (np.bincount(rows, weights=need) for need in (lengths, tiles))
    assert rows.min() == 0 and (np.bincount(rows) > 0).all()
    assert (tokens <= bucket.length).all() and (slots <= bucket.tiles).all()
    if saved_per_tile:
        assert (tokens - saved_per_tile * slots <= bucket.short_length).all()
    return tokens, slots


@pytest.mark.parametrize("bucket", [Bucket(30, 1500, 900), Bucket(40, 40_000, 25_000)])
@pytest.mark.parametrize("saved", [0, 10])
def test_filled_rows_fit(bucket, saved):
    for seed in range(4):
        tiles, lengths = samples(seed, 300)
        rows = fill_rows(lengths, tiles, bucket, waiting=16, saved_per_tile=saved)
        check_rows(rows, tiles, lengths, bucket, saved)
        # Of those that wait the oldest is always taken, so that nobody is overtaken by many.
        first = [np.flatnonzero(rows == row)[0] for row in range(rows.max() + 1)]
        assert first == sorted(first)


def test_the_rest_of_a_row_is_the_best_choice():
    """Against all subsets, after the samples that are taken as they come."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        lengths, tiles = draw.integers(5, 60, 10), draw.integers(0, 4, 10)
        bucket, saved = Bucket(5, 100, 70), int(draw.integers(0, 2)) * 5
        rows = fill_rows(lengths, tiles, bucket, waiting=10, saved_per_tile=saved)
        chosen = set(np.flatnonzero(rows == 0).tolist())

        def fits(some):
            n, t = int(lengths[some].sum()), int(tiles[some].sum())
            return n <= 100 and t <= 5 and (not saved or n - saved * t <= 70)

        came = 1  # taken as they come: the first, and more while a quarter of the row stays
        while fits(list(range(came + 1))) and 100 - lengths[: came + 1].sum() >= 25:
            came += 1
        assert set(range(came)) <= chosen
        best = max(
            int(lengths[:came].sum() + lengths[list(more)].sum())
            for size in range(11 - came)
            for more in itertools.combinations(range(came, 10), size)
            if fits([*range(came), *more])
        )
        assert int(lengths[sorted(chosen)].sum()) == best


def test_filled_rows_are_fuller():
    tiles, lengths = samples(1, 3000)
    bucket = Bucket(64, 4096)
    fuller = fill_rows(lengths, tiles, bucket, waiting=64).max()
    assert fuller < best_fit(lengths, 4096, also=[(tiles, 64)], open_rows=64).max()
    assert lengths.sum() / (fuller + 1) / 4096 > 0.99


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_executables", [1, 2, 5, 16, 1000])
def test_at_most_max_executables_and_every_sample_fits(max_executables):
    for seed in range(8):
        tiles, lengths = samples(seed, 200)
        buckets, code = assign_buckets(tiles, lengths, max_executables)
        assigned = [buckets[b] for b in code]
        needed = {smallest_bucket(t, n) for t, n in zip(tiles, lengths)}
        assert len(set(assigned)) == min(max_executables, len(needed)), (
            "at most so many, and none given away"
        )
        assert all(
            t <= bucket.tiles and n <= bucket.length
            for t, n, bucket in zip(tiles, lengths, assigned)
        )


def test_without_need_nothing_is_merged():
    tiles, lengths = samples(0)
    buckets, code = assign_buckets(tiles, lengths, 1000)
    assert [buckets[b] for b in code] == [smallest_bucket(t, n) for t, n in zip(tiles, lengths)]


def test_the_rarest_bucket_merges_where_it_costs_least():
    tiles = np.array([0] * 9 + [1] * 5 + [7] * 5 + [1])
    lengths = np.array([100] * 9 + [200] * 5 + [300] * 5 + [300])
    # One sample of (1, 384): longer rows for five (1, 256) are cheaper than six tiles more for
    # itself.
    buckets, code = assign_buckets(tiles, lengths, 3)
    assert [buckets[b] for b in code[9:]] == [Bucket(1, 384)] * 5 + [Bucket(7, 384)] * 5 + [
        Bucket(1, 384)
    ]


def test_a_merged_bucket_is_as_frequent_as_both():
    tiles = np.array([0] * 7 + [7] * 14)
    lengths = np.array([128] * 3 + [256] * 4 + [128] * 5 + [384] * 9)
    # First the texts become one bucket of 7 samples, then the 5 of (7, 128) are the rarest.
    assert assign_buckets(tiles, lengths, 2)[0] == [Bucket(0, 256), Bucket(7, 384)]


def test_photos_and_receipts_need_seven_tile_buckets(shared_data):
    """1,626 real image sizes, at most 6 tiles and a thumbnail."""
    with open(shared_data / "image_sizes.csv", newline="") as file:
        sizes = [(int(row["width"]), int(row["height"])) for row in csv.DictReader(file)]
    assert len(sizes) == 1626
    for rule in ("edge", "area", "off"):
        tiles = np.array([tile_count(TileConfig(rule=rule, max_num=6), *size) for size in sizes])
        buckets, code = assign_buckets(tiles, tiles * 256 + 100, max_executables=1000)
        assert {bucket.tiles for bucket in buckets} <= set(TILE_BUCKETS[:7])
        assert all(buckets[b].tiles == count for b, count in zip(code, tiles)), (
            "no padded tile slot"
        )


def real_mix(shared_data, rule="edge"):
    """(tiles, tokens) of 1,626 real sizes, at most 6 tiles, with texts as long as the receipts'."""
    with open(shared_data / "image_sizes.csv", newline="") as file:
        sizes = [(int(row["width"]), int(row["height"])) for row in csv.DictReader(file)]
    tiles = np.array([tile_count(TileConfig(rule=rule, max_num=6), *size) for size in sizes])
    return tiles, tiles * 256 + np.random.default_rng(0).integers(139, 156, len(tiles))


def test_padding_of_the_real_mix(shared_data):
    """Five buckets pad at most 4 % of the tokens; packed rows 2 %, and 5 % of the tiles."""
    tiles, lengths = real_mix(shared_data)
    buckets, code = assign_buckets(tiles, lengths, 16, 64, costs=SlotCosts())
    trimmed = trim_buckets(buckets, code, tiles, lengths)
    assert len(set(trimmed)) == len(buckets) == 5
    assert lengths.sum() / sum(trimmed[b].length for b in code) > 0.96
    assert all(trimmed[b].tiles == count for b, count in zip(code, tiles))

    order = np.random.default_rng(1).permutation(len(tiles))
    tiles, lengths = tiles[order], lengths[order]
    bucket = Bucket(-(-int(tiles.sum() * 1.02 * 8192) // int(lengths.sum())), 8192)
    rows = fill_rows(lengths, tiles, bucket, waiting=64)
    tokens, slots = check_rows(rows, tiles, lengths, bucket)
    assert tokens.mean() / bucket.length > 0.98 and slots.mean() / bucket.tiles > 0.95


def test_trimmed_buckets_hold_their_samples():
    for saved in (0, 12):
        tiles, lengths = samples(0)
        buckets, code = assign_buckets(tiles, lengths, 6, saved_per_tile=saved, costs=SlotCosts())
        trimmed = trim_buckets(buckets, code, tiles, lengths, saved)
        for bucket, before, number in zip(trimmed, buckets, range(len(buckets))):
            inside = code == number
            assert bucket.tiles == tiles[inside].max() and bucket.length % 16 == 0
            assert 0 <= bucket.length - lengths[inside].max() < 16
            short = (lengths - saved * tiles)[inside].max()
            assert not saved or 0 <= bucket.short_length - short < 16
            assert bucket.length <= before.length and bucket.short_length <= before.short_length


@pytest.mark.parametrize(
    "model, tile, short",
    [(internvlx_2b(), 243, 0.0), (internvlx_8b(), 76, 0.0), (internvlx_2b("fast"), 0, 0)],
)
def test_costs_are_those_of_the_model(model, tile, short):
    costs = SlotCosts.of(*slot_flops(model))
    if model.lvtc is None:
        assert round(costs.tile) == tile and costs.short == short
        return
    plain = slot_flops(internvlx_2b())
    token, shallow, _ = slot_flops(model)
    assert token + shallow == pytest.approx(plain[0])  # 19 layers of 24, and 5 with the head
    assert costs.short == pytest.approx(shallow / token, abs=1e-3) and costs.short > 1


def test_costs_decide_what_merges():
    tiles = np.array([0] * 20 + [4] * 9 + [3])
    lengths = np.array([1100] * 20 + [100] * 9 + [1100])
    # The sample of (3, 1152) makes nine rows longer, or twenty rows wider.
    for cost, merged in ((1.0, Bucket(3, 1152)), (1000.0, Bucket(4, 1152))):
        buckets, code = assign_buckets(tiles, lengths, 2, costs=SlotCosts(tile=cost))
        assert buckets[code[-1]] == merged
