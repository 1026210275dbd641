"""Bucket plans: pure, complete, one bucket a step, few executables (spec: data.md 11)."""

import collections
import csv
import dataclasses

import numpy as np
import pytest

from internvlx_jax.data.plan import (LENGTH_STEP, MASKED, TILE_BUCKETS, BatchRule, Bucket, assign_buckets, epoch_steps,
                                     plan_hash, smallest_bucket)
from internvlx_jax.data.tiles import TileConfig, tile_count
from internvlx_jax.errors import ConfigError

TOKENS = 8192
RULE = BatchRule(row_quantum=4, tokens=TOKENS)


def samples(seed: int, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """(tile counts, token lengths) of a mix of text, one-image and multi-image samples."""
    rng = np.random.default_rng(seed)
    tiles = rng.choice([0, 1, 2, 3, 4, 5, 7, 9, 20, 30], n, p=[0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.06, 0.03, 0.01])
    return tiles, tiles * 16 + rng.integers(8, 700, n)


@pytest.fixture(scope="module")
def buckets() -> list[Bucket]:
    return assign_buckets(*samples(0), max_executables=10)


@pytest.mark.parametrize("tiles, length, bucket", [
    (0, 1, (0, 128)), (0, 128, (0, 128)), (0, 129, (0, 256)), (1, 300, (1, 384)), (2, 10, (3, 128)),
    (7, 1900, (7, 1920)), (9, 10, (12, 128)), (24, 10, (24, 128)), (25, 10, (32, 128)),
])  # fmt: skip
def test_the_smallest_bucket_of_a_sample(tiles, length, bucket):
    assert smallest_bucket(tiles, length) == Bucket(*bucket)


@pytest.mark.parametrize("epoch", [0, 3])
def test_each_entry_stands_exactly_once_in_an_epoch(buckets, epoch):
    steps = epoch_steps(buckets, RULE, seed=1, epoch=epoch)
    entries = [entry for step in steps for entry in step.entries if entry != MASKED]
    assert sorted(entries) == list(range(len(buckets)))


def test_every_step_has_one_bucket_and_only_the_remainder_is_masked(buckets):
    steps = epoch_steps(buckets, RULE, seed=1, epoch=0)
    masked = collections.Counter()
    for step in steps:
        assert len(step.entries) == RULE.rows(step.bucket)
        real = [entry for entry in step.entries if entry != MASKED]
        assert real and {buckets[entry] for entry in real} == {step.bucket}
        assert list(step.entries) == real + [MASKED] * (len(step.entries) - len(real))
        masked[step.bucket] += MASKED in step.entries
    assert max(masked.values()) == 1, "at most the last step of a bucket holds masked rows"
    for bucket, count in collections.Counter(buckets).items():
        assert sum(step.bucket == bucket for step in steps) == -(-count // RULE.rows(bucket))


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


def test_the_plan_is_a_pure_function(buckets):
    np.random.seed(0)
    first = epoch_steps(buckets, RULE, seed=1, epoch=2)
    np.random.seed(1)
    assert epoch_steps(list(buckets), BatchRule(row_quantum=4, tokens=TOKENS), seed=1, epoch=2) == first


def test_epochs_and_seeds_have_orders_of_their_own(buckets):
    plans = [epoch_steps(buckets, RULE, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0), (0, 1))]
    orders = {tuple(entry for step in plan for entry in step.entries) for plan in plans}
    assert len(orders) == len(plans)
    assert len({len(plan) for plan in plans}) == 1, "every epoch has the same number of steps"


def test_rare_buckets_do_not_gather_at_the_end(buckets):
    """Unpermuted, all steps with masked rows would be the last ones."""
    last = []
    for epoch in range(20):
        steps = epoch_steps(buckets, RULE, seed=1, epoch=epoch)
        last += [i / (len(steps) - 1) for i, step in enumerate(steps) if MASKED in step.entries]
    assert 0.4 < np.mean(last) < 0.6


@pytest.mark.parametrize("max_executables", [1, 2, 5, 16, 1000])
def test_at_most_max_executables_and_every_sample_fits(max_executables):
    for seed in range(8):
        tiles, lengths = samples(seed, 200)
        assigned = assign_buckets(tiles, lengths, max_executables)
        needed = {smallest_bucket(t, n) for t, n in zip(tiles, lengths)}
        assert len(set(assigned)) == min(max_executables, len(needed)), "at most so many, and none given away"
        assert all(t <= bucket.tiles and n <= bucket.length for t, n, bucket in zip(tiles, lengths, assigned))


def test_without_need_nothing_is_merged():
    tiles, lengths = samples(0)
    assert assign_buckets(tiles, lengths, 1000) == [smallest_bucket(t, n) for t, n in zip(tiles, lengths)]


def test_the_rarest_bucket_merges_where_it_costs_least():
    tiles = np.array([0] * 9 + [1] * 5 + [7] * 5 + [1])
    lengths = np.array([100] * 9 + [200] * 5 + [300] * 5 + [300])
    # One sample of (1, 384): longer rows for five (1, 256) are cheaper than six tiles more for itself.
    assert assign_buckets(tiles, lengths, 3)[9:] == [Bucket(1, 384)] * 5 + [Bucket(7, 384)] * 5 + [Bucket(1, 384)]


def test_a_merged_bucket_is_as_frequent_as_both():
    tiles = np.array([0] * 7 + [7] * 14)
    lengths = np.array([128] * 3 + [256] * 4 + [128] * 5 + [384] * 9)
    # First the texts become one bucket of 7 samples, then the 5 of (7, 128) are the rarest.
    assert set(assign_buckets(tiles, lengths, 2)) == {Bucket(0, 256), Bucket(7, 384)}


def test_the_hash_names_everything_that_decides_the_order(buckets):
    inputs = {"buckets": buckets, "rule": RULE, "seed": 1, "fingerprint": "a"}
    other = {"buckets": [*buckets[1:], buckets[0].union(Bucket(24, 0))], "seed": 2, "fingerprint": "b"}
    rules = [dataclasses.replace(RULE, **change) for change in ({"row_quantum": 8}, {"tokens": 4096}, {"tiles": 64},
                                                                {"samples": 128})]
    assert plan_hash(**inputs) == plan_hash(**inputs)
    hashes = [plan_hash(**inputs), *(plan_hash(**inputs | {name: value}) for name, value in other.items()),
              *(plan_hash(**inputs | {"rule": rule}) for rule in rules)]
    assert len(set(hashes)) == len(hashes)


def test_photos_and_receipts_need_seven_tile_buckets(shared_data):
    """1,626 real image sizes, at most 6 tiles and a thumbnail."""
    with open(shared_data / "image_sizes.csv", newline="") as file:
        sizes = [(int(row["width"]), int(row["height"])) for row in csv.DictReader(file)]
    assert len(sizes) == 1626
    for rule in ("edge", "area", "off"):
        tiles = np.array([tile_count(TileConfig(rule=rule, max_num=6), *size) for size in sizes])
        assigned = assign_buckets(tiles, tiles * 256 + 100, max_executables=1000)
        assert {bucket.tiles for bucket in assigned} <= set(TILE_BUCKETS[:7])
        assert all(bucket.tiles == count for bucket, count in zip(assigned, tiles)), "no padded tile slot"
