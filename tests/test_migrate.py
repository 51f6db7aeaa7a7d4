"""Stored tables get the names that the code has now, with their checksums, and lose nothing else."""

import shutil

import pytest
from ranks import ROOT

from maco_lib.linear.plan import LinearPlan
from study.commands import migrate
from study.harness.files import DataError
from study.results.store import Store
from study.sections.linear_all_reduce.methods import CHAIN, MATMUL, METHODS

OLD = {"sequential:gloo": "sequential, gloo", "chunked:2:gloo": '"chunked, 2 along m, gloo"'}
TABLE = "linear_all_reduce.csv"


@pytest.fixture
def store(tmp_path) -> Store:
    """The stored tables of a CPU, with plans in the words of before."""
    shutil.copytree(ROOT / "data" / "cpu-2", tmp_path / "data" / "cpu-2", ignore=shutil.ignore_patterns("executed"))
    store = Store(tmp_path)
    record, contents = store.record("cpu-2", "linear_all_reduce"), {}
    for filename in (TABLE, "linear_all_reduce.launches.csv"):
        text = (store.data / "cpu-2" / filename).read_text()
        for name, words in OLD.items():
            text = text.replace(f",{name},", f',"{words}",' if '"' not in words else f",{words},")
        contents[filename] = text.encode()
    migrate.rewrite(store, "cpu-2", "linear_all_reduce", record, contents)
    return store


def test_plans_are_renamed_with_their_checksums_once(store):
    before = store.read("cpu-2", "linear_all_reduce")
    assert before["plan"].str.contains(", ").any()
    untouched = {path: path.read_bytes() for path in (store.data / "cpu-2").glob("overlap*")}
    assert migrate.migrate(store, "cpu-2") == [TABLE, "linear_all_reduce.launches.csv"]
    after = store.read("cpu-2", "linear_all_reduce")  # the checksum is the new file's, and the schema holds
    plans = [plan for plan in after["plan"] if plan]
    assert plans and all(LinearPlan.parse(plan).name == plan for plan in plans)
    assert after["plan"].map(bool).equals(before["plan"].map(bool))
    assert after.drop(columns="plan").equals(before.drop(columns="plan"))
    assert set(store.launches("cpu-2", "linear_all_reduce")["plan"]) == set(after["plan"])
    assert untouched == {path: path.read_bytes() for path in untouched}
    assert migrate.migrate(store, "cpu-2") == [] and "replacing" not in store.record("cpu-2", "linear_all_reduce")


def test_what_is_no_plan_stays():
    kept = ["", "default plan: captured unprepared", "signalled, 4 along m, maco_staged_8", "persistent:2x64"]
    assert [migrate.plan_name(text) for text in kept] == kept
    assert migrate.plan_name("persistent, 2 × 128 staggered evened") == "persistent:2x128-staggered-evened"


def test_a_table_that_would_not_be_written_back_as_it_was_is_left():
    with pytest.raises(DataError, match="t.csv is not written as tables are"):
        migrate.renamed(b'"plan",m\r\nsequential,1\r\n', {"plan": migrate.plan_name}, "t.csv")


def test_every_stored_plan_has_its_name():
    store = Store(ROOT)
    for name in store.machines():
        if "linear_all_reduce" in store.record(name, "linear_all_reduce").get("tables", {}):
            rows = store.read(name, "linear_all_reduce")
            runs = rows["method"].map(lambda method: METHODS[MATMUL].get(method, METHODS[CHAIN].get(method)).how)
            plans = [plan for plan in rows.loc[runs.ne("retired"), "plan"] if plan]
            assert plans and all(LinearPlan.parse(plan).name == plan for plan in plans), name
