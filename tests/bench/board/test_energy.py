"""Meters on simulated sensors: known loads give known joules, idle is subtracted, a sensor that goes leaves null."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paredown.bench.board import energy, ina3221, nvml, rapl, sensors, tegrastats

from .machines import Clock, Nvml, orin_nano, write

ZONE = "sys/class/powercap/intel-rapl:0"


class Load:
    """A meter whose watts the test sets; `clock` stands still while it is read."""

    name, covers, rails, counts = "load", "board", ("all",), False

    def __init__(self, watts: Callable[[], float]) -> None:
        self.watts = watts

    def read(self) -> float:
        return self.watts()

    def close(self) -> None:
        """Nothing is held open."""


def _package(root: Path, microjoules: float, zone: int = 0, name: str = "package-0", top: float = 1e9) -> Path:
    folder = f"sys/class/powercap/intel-rapl:{zone}"
    return write(
        root,
        {
            f"{folder}/name": name,
            f"{folder}/energy_uj": round(microjoules),
            f"{folder}/max_energy_range_uj": round(top),
        },
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "TURN_SECONDS", 0.05)


# --- each meter


def test_rapl_adds_packages_and_nothing_else(tmp_path: Path) -> None:
    for zone, name in ((0, "package-0"), (1, "package-1"), (2, "psys")):
        _package(tmp_path, 5e6, zone, name)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0:0/name": "core"})
    meter = rapl.open(tmp_path)
    assert meter.rails == ("package-0", "package-1")
    for zone in (0, 1, 2):
        _package(tmp_path, 8e6, zone, f"package-{zone}")
    assert meter.read() == pytest.approx(6.0)


def test_rapl_undoes_a_wrap(tmp_path: Path) -> None:
    meter = rapl.open(_package(tmp_path, 900e6))
    _package(tmp_path, 100e6)
    assert meter.read() == pytest.approx(200.0)
    _package(tmp_path, 950e6)
    _package(tmp_path, 999e6)
    assert meter.read() == pytest.approx(1099.0)


def test_rapl_that_is_absent_or_forbidden_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sensors.Unavailable, match=r"^the kernel shows no RAPL package$"):
        rapl.open(tmp_path)
    _package(tmp_path, 1e6)

    def forbidden(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sensors, "text", lambda path: "package-0")
    monkeypatch.setattr(Path, "read_text", forbidden)  # permissions do not bind root, who may run the tests
    with pytest.raises(sensors.Unavailable, match=r"^reading max_energy_range_uj is not permitted$"):
        rapl.open(tmp_path)


def test_a_module_input_is_the_whole(tmp_path: Path) -> None:
    meter = ina3221.open(orin_nano(tmp_path, milliamperes=1240))
    assert meter.rails == ("VDD_IN",)
    assert meter.read() == pytest.approx(6.2)


def test_without_an_input_rails_are_added(tmp_path: Path) -> None:
    labels = {"hwmon3": ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "hwmon4": ("NC", "VDDQ_VDD2_1V8AO")}
    for chip, names in labels.items():
        write(tmp_path, {f"sys/class/hwmon/{chip}/name": "ina3221"})
        for index, name in enumerate(names, 1):
            files = {f"in{index}_label": name, f"in{index}_input": 5000, f"curr{index}_input": 100}
            write(tmp_path, {f"sys/class/hwmon/{chip}/{key}": value for key, value in files.items()})
    meter = ina3221.open(tmp_path)
    assert meter.rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert meter.read() == pytest.approx(1.5)


def test_jetpack_4_has_milliwatts(tmp_path: Path) -> None:
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    write(tmp_path, {f"{folder}/rail_name_0": "POM_5V_IN", f"{folder}/in_power0_input": 2540})
    meter = ina3221.open(tmp_path)
    assert (meter.rails, meter.read()) == (("POM_5V_IN",), 2.54)


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("RAM 1/2MB CPU [1%@729] VDD_IN 4852mW/4790mW VDD_SOC 1400mW/1390mW", {"VDD_IN": 4.852, "VDD_SOC": 1.4}),
        ("RAM 1/2MB GPU@47C POM_5V_IN 2540/2500 POM_5V_GPU 40/40", {"POM_5V_IN": 2.54, "POM_5V_GPU": 0.04}),
        ("RAM 1/2MB CPU [1%@729] SOC0@70C", {}),
    ],
)
def test_lines_of_tegrastats(line: str, watts: dict[str, float]) -> None:
    assert tegrastats.parse(line) == watts


def test_tegrastats_is_followed_and_ended(tmp_path: Path) -> None:
    script = "import time\nwhile True: print('VDD_IN 5000mW/5000mW', flush=True); time.sleep(0.01)"
    meter = tegrastats.Meter((sys.executable, "-c", script))
    assert meter.read() == 5.0
    meter.close()
    with pytest.raises(sensors.Unavailable, match="tegrastats fell silent"):
        meter.read()
    with pytest.raises(sensors.Unavailable, match="tegrastats names no power rail"):
        tegrastats.Meter((sys.executable, "-c", "print('RAM')"))
    with pytest.raises(sensors.Unavailable, match="tegrastats does not start"):
        tegrastats.Meter((str(tmp_path / "tegrastats"),))


@pytest.mark.parametrize("counter", [True, False])
def test_a_card_of_known_watts(counter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(watts=250.0, counter=counter)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = nvml.open()
    assert meter.counts is counter
    drawn = _integrate(meter, library.clock, [250.0] * 10, lambda watts: None)
    assert drawn == pytest.approx(2500.0)
    meter.close()
    assert library.open == 0


def test_no_card_is_said_and_the_library_released(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(cards=0)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with pytest.raises(sensors.Unavailable, match=r"NVML does not tell it \(Not Found\)"):
        nvml.open()
    assert library.open == 0


# --- integration


def _integrate(meter: object, clock: Clock, loads: list[float], draw: Callable[[float], None]) -> float:
    """Return the joules of one-second loads; the thread waits so long that only we read."""
    integrator = energy.Integrator(meter, clock, interval=3600.0)
    for watts in loads:
        draw(watts)
        integrator.joules()
        clock.now += 1.0
        joules = integrator.joules()
    integrator.close()
    return joules


def test_a_constant_load_is_its_known_joules() -> None:
    clock = Clock()
    assert _integrate(Load(lambda: 7.5), clock, [7.5] * 4, lambda _: None) == pytest.approx(30.0)


def test_steps_are_integrated_by_trapezoids() -> None:
    clock, now = Clock(), [2.0]
    integrator = energy.Integrator(Load(lambda: now[0]), clock, interval=3600.0)
    clock.now, now[0] = 2.0, 4.0
    assert integrator.joules() == pytest.approx(6.0)
    integrator.close()


def test_the_thread_reads_on_its_own() -> None:
    reads: list[int] = []
    integrator = energy.Integrator(Load(lambda: float(len(reads) or reads.append(1) or 1)), interval=0.001)
    integrator.window(lambda: None)
    integrator._thread.join(0.05)
    integrator.close()
    assert integrator._last[0] > 0
    assert integrator.joules() > 0


def test_idle_power_is_subtracted(quick: None) -> None:
    """4 W idle, 10 W while a call runs: each run of 5 ms costs 6 W above idle."""
    busy = [False]

    def work() -> None:
        import time

        busy[0] = True
        time.sleep(0.005)

    meter = Load(lambda: 10.0 if busy[0] else 4.0)
    (found,) = energy.measure([work], meter, idle_seconds=0.05)
    assert found.idle_w == pytest.approx(4.0)
    assert found.mean_w == pytest.approx(10.0, rel=0.2)
    assert found.joules_per_run is not None
    expected = found.mean_w * found.seconds - 4.0 * found.seconds  # type: ignore[operator]
    assert found.joules_per_run * found.runs == pytest.approx(expected)
    assert (found.meter, found.rails, found.unavailable) == ("load", ("all",), "")


def test_a_counter_gives_the_known_joules_per_run(quick: None) -> None:
    """Each call advances the counter by exactly 3 J, and nothing else does."""
    joules = [0.0]
    meter = Load(lambda: joules[0])
    meter.counts = True

    def call(amount: float) -> Callable[[], None]:
        def run() -> None:
            joules[0] += amount

        return run

    first, second = energy.measure([call(3.0), call(1.5)], meter, idle_seconds=0.01)
    assert first.joules_per_run == pytest.approx(3.0)
    assert second.joules_per_run == pytest.approx(1.5)


def test_a_load_like_idle_is_null_with_the_reason(quick: None) -> None:
    (found,) = energy.measure([lambda: None], Load(lambda: 5.0), idle_seconds=0.02)
    if found.joules_per_run is not None:
        assert found.joules_per_run == pytest.approx(0.0, abs=1e-6)
    else:
        assert found.unavailable == "the load drew no more than idle"


def test_a_sensor_that_vanishes_leaves_null_and_the_reason(tmp_path: Path, quick: None) -> None:
    meter = ina3221.open(orin_nano(tmp_path))

    def unplug() -> None:
        (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").unlink(missing_ok=True)

    (found,) = energy.measure([unplug], meter, idle_seconds=0.01)
    assert found.joules_per_run is None
    assert found.unavailable == "the sensor vanished: curr1_input cannot be read (No such file or directory)"


def test_a_card_that_is_lost_leaves_null(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    library = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)

    def lose() -> None:
        library.gone = True

    (found,) = energy.measure([lose], nvml.open(), idle_seconds=0.01)
    assert (found.joules_per_run, found.unavailable) == (
        None,
        "the sensor vanished: NVML does not tell it (GPU is lost)",
    )


# --- the choice


def test_auto_prefers_the_whole_board(tmp_path: Path) -> None:
    _package(orin_nano(tmp_path), 1e6)
    assert energy.open_meter("auto", tmp_path).name == "ina3221"


def test_auto_takes_what_measures_the_device_that_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    with pytest.raises(sensors.Unavailable, match="nvml: it measures the gpu, and the cpu computes"):
        energy.open_meter("auto", tmp_path)
    assert energy.open_meter("auto", tmp_path, "gpu").name == "nvml"
    _package(tmp_path, 1e6)
    assert energy.open_meter("auto", tmp_path).name == "rapl"


def test_where_there_is_none_each_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reasons = "no INA3221 sensor; tegrastats: .*; rapl: the kernel shows no RAPL package; nvml: nvidia-ml-py is not"
    with pytest.raises(sensors.Unavailable, match=reasons):
        energy.open_meter("auto", tmp_path)


def test_a_meter_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "wattmeter.py").write_text("def open(root): return 'mine'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert energy.open_meter("lab.wattmeter", tmp_path) == "mine"
