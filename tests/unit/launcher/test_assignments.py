"""Who is measured when and with whom."""

from hypothesis import given
from hypothesis import strategies as st

from launcher.assignments import doubtful_first, others_in_ring, pairings, second_looker, shard_parts, turns
from launcher.measurements import KnownNode, ShardLook

names = st.lists(st.text("abcdefgh", min_size=1), unique=True, max_size=12)


@given(names, st.integers(0, 15))
def test_each_node_meets_so_many_others_once(nodes: list[str], most: int) -> None:
    rounds = pairings(nodes, most)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    assert len(rounds) <= most
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    for node in nodes:
        assert sum(node in pair for pair in met) >= min(most - len(nodes) % 2, len(nodes) - 1)


@given(st.dictionaries(st.text("abcdefgh", min_size=1), st.sampled_from("xyz")))
def test_nodes_of_one_machine_take_turns(machines: dict[str, str]) -> None:
    found = turns(machines)
    assert sorted(node for turn in found for node in turn) == sorted(machines)
    for turn in found:
        assert len({machines[node] for node in turn}) == len(turn) > 0


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 40))
def test_every_shard_is_looked_at_once_where_that_is_possible(num_shards: int, num_nodes: int, most: int) -> None:
    parts = shard_parts(num_shards, num_nodes, most)
    looked = [shard for part in parts for shard in part]
    assert all(0 <= shard < num_shards for shard in looked)
    assert all(1 <= len(part) <= most for part in parts)
    if num_shards:
        assert len(parts) == num_nodes
    if num_nodes <= num_shards <= num_nodes * most:
        assert sorted(looked) == list(range(num_shards))
    if num_shards >= num_nodes:
        assert len(set(looked)) == len(looked)


def test_a_million_shards_on_a_thousand_nodes() -> None:
    parts = shard_parts(1_000_000, 1000, 100)
    assert {len(part) for part in parts} == {100}
    assert max(max(part) for part in parts) > 980_000


def test_this_machine_looks_again() -> None:
    nodes = [KnownNode(name, "10.0.0.1", name, is_here=name == "b") for name in "abc"]
    assert [second_looker(first, nodes) for first in "abc"] == ["b", "a", "b"]
    assert second_looker("b", nodes[1:2]) == "b"
    assert second_looker("c", nodes[2:]) == "c"


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9)), st.integers(0, 30))
def test_every_node_that_found_something_wrong_has_some_of_it_looked_at_again(counts: dict[str, int], most: int) -> None:
    looks = {node: ShardLook(9, {f"{node}{nth}": "is missing" for nth in range(count)}) for node, count in counts.items()}
    chosen = doubtful_first(looks, most)
    assert len(chosen) == len(set(chosen)) == min(most, sum(counts.values()))
    assert all(name in looks[node].failed for node, name in chosen)
    if most >= len(counts):
        assert {node for node, _ in chosen} == {node for node, count in counts.items() if count}


@given(names.filter(bool), st.integers(0, 12))
def test_others_in_the_ring(nodes: list[str], most: int) -> None:
    for node in nodes:
        others = others_in_ring(nodes, node, most)
        assert node not in others
        assert len(others) == len(set(others)) == min(most, len(nodes) - 1)
