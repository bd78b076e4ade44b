"""What a device says of itself: classes only, from files as Linux writes them."""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.device import DeviceProfile, coarse, measure, network_of
from clients.free_memory import free_bytes, groups, total_bytes
from clients.power import FilePower, Power
from strategies.profiles import VOCABULARY, pack_profile

GIB = 2**30
DEVICE = DeviceProfile(
    cores=4, memory=8 * GIB, free=GIB, power=None, network="unknown", megabits=None, gpu=False
)
ROUTES = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"


@pytest.mark.parametrize(
    ("field", "value", "key", "word"),
    [("cores", n, "cores", w) for n, w in ((1, "1-2"), (2, "1-2"), (3, "3-4"), (4, "3-4"))]
    + [("cores", n, "cores", w) for n, w in ((5, "5-8"), (8, "5-8"), (9, "9+"), (256, "9+"))]
    + [("memory", 2 * GIB - 1, "memory", "<2"), ("memory", 2 * GIB, "memory", "2-4")]
    + [("memory", 4 * GIB, "memory", "4-8"), ("memory", 8 * GIB, "memory", "8-16")]
    + [("memory", 16 * GIB, "memory", "16+"), ("memory", 2**50, "memory", "16+")]
    + [("power", None, "power", "mains"), ("power", Power(5, True), "power", "mains")]
    + [("power", Power(20, False), "power", "battery"), ("power", Power(19.9, False), "power", "low")]
    + [("network", "metered", "network", "metered"), ("gpu", True, "gpu", "yes")],
)  # fmt: skip
def test_a_device_is_of_one_class_of_each_kind(field, value, key, word):
    assert coarse(replace(DEVICE, **{field: value}))[key] == word


@given(
    cores=st.integers(1, 10_000),
    memory=st.integers(0, 2**60),
    free=st.integers(0, 2**60),
    power=st.none() | st.builds(Power, st.floats(0, 100), st.booleans()),
    network=st.sampled_from(VOCABULARY["network"]),
    megabits=st.none() | st.integers(1, 10**6),
    gpu=st.booleans(),
)
def test_nothing_but_classes_comes_of_any_device(
    cores, memory, free, power, network, megabits, gpu
):
    told = coarse(DeviceProfile(cores, memory, free, power, network, megabits, gpu))
    assert told.keys() == VOCABULARY.keys()
    assert dict(pack_profile(told)) == told
    other = coarse(DeviceProfile(cores, memory, 0, power, network, None, gpu))
    assert told == other  # free memory and the link's speed never travel


def test_this_device_is_measured():
    found = measure()
    assert found.cores == len(os.sched_getaffinity(0))
    assert 0 < found.free <= found.memory <= psutil.virtual_memory().total


def test_a_batterys_file_that_cannot_be_read_is_no_battery_of_the_profile(tmp_path):
    assert measure(FilePower(tmp_path / "gone")).power is None


# ---- the network ----


def interface(root: Path, name: str, *, metric: int = 0, **files: str) -> None:
    """An interface with a default route; an empty file stands for a folder."""
    routes = root / "proc/net/route"
    routes.parent.mkdir(parents=True, exist_ok=True)
    lines = routes.read_text() if routes.exists() else ROUTES
    line = f"{name} 00000000 010200C0 0003 0 0 {metric} 00000000 0 0 0\n"
    routes.write_text(lines + line + f"{name} 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n")
    folder = root / "sys/class/net" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("enp3s0", {"device": "", "speed": "1000\n"}, ("unmetered", 1000)),
        ("eth0", {"device": "", "speed": "-1\n"}, ("unmetered", None)),
        ("wlan0", {"device": "", "wireless": ""}, ("unknown", None)),
        ("wlp2s0", {"device": "", "phy80211": "", "speed": "x"}, ("unknown", None)),
        ("wwan0", {"device": ""}, ("metered", None)),
        ("enx0", {"device": "", "uevent": "DEVTYPE=wwan\nINTERFACE=enx0\n"}, ("metered", None)),
        ("ppp0", {}, ("metered", None)),
        ("tun0", {"speed": "10"}, ("unknown", 10)),
    ],
)
def test_a_cable_is_unmetered_a_mobile_network_metered_and_all_else_unknown(
    tmp_path, name, files, found
):
    interface(tmp_path, name, **files)
    assert network_of(tmp_path) == found


def test_the_default_route_of_the_least_metric_is_what_traffic_takes(tmp_path):
    interface(tmp_path, "wwan0", metric=700)
    interface(tmp_path, "eth0", metric=100, device="")
    assert network_of(tmp_path)[0] == "unmetered"


@pytest.mark.parametrize("routes", ["", ROUTES, ROUTES + "eth0\n", ROUTES + "eth0 0 0 x y z w v\n"])
def test_a_device_without_a_route_has_no_network_to_tell_of(tmp_path, routes):
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/route").write_text(routes)
    assert network_of(tmp_path) == ("unknown", None)


# ---- memory ----


def group(root: Path, said: str, folder: str, **files: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(said)
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)


def test_a_services_limit_counts_and_what_is_reclaimable_is_free(tmp_path):
    group(
        tmp_path,
        "0::/system.slice/trellis.service\n",
        "system.slice/trellis.service",
        memory__max="300000000\n",
        memory__current="200000000\n",
        memory__stat="anon 150000000\ninactive_file 50000000\nactive_file 1\n",
    )
    assert total_bytes(tmp_path) == 300_000_000
    assert free_bytes(tmp_path) == 150_000_000


def test_the_tightest_group_above_a_process_counts(tmp_path):
    said = "0::/a/b\n"
    group(tmp_path, said, "a/b", memory__max="max\n", memory__current="1000\n")
    group(tmp_path, said, "a", memory__max="5000\n", memory__current="4000\n")
    assert [one.limit for one in groups(tmp_path)] == [5000]
    assert (total_bytes(tmp_path), free_bytes(tmp_path)) == (5000, 1000)


def test_a_container_sees_its_own_limit_at_the_root(tmp_path):
    for path in ("/", "/../../elsewhere"):
        group(tmp_path, f"0::{path}\n", ".", memory__max="7000\n", memory__current="8000\n")
        assert (total_bytes(tmp_path), free_bytes(tmp_path)) == (7000, 0)


def test_groups_of_the_first_version_count_as_well(tmp_path):
    group(
        tmp_path,
        "5:cpu:/\n4:memory:/own\n",
        "memory/own",
        memory__limit_in_bytes="9000",
        memory__usage_in_bytes="4000",
        memory__stat="total_inactive_file 1000\n",
    )
    assert (total_bytes(tmp_path), free_bytes(tmp_path)) == (9000, 6000)


def test_no_limit_is_the_machines(tmp_path):
    machine = psutil.virtual_memory().total
    assert total_bytes(tmp_path) == machine
    unlimited = str(2**63 - 4096)
    files = {"memory__limit_in_bytes": unlimited, "memory__usage_in_bytes": "1"}
    group(tmp_path, "4:memory:/\n", "memory", **files)
    assert total_bytes(tmp_path) == machine
