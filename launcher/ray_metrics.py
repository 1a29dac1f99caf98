"""The seam to Ray's metrics: passes on where a run stands, through the Prometheus endpoint of the driver's node."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.run_metrics import OF_RUN, OF_STEP, PREFIX, TOTALS, Vitals

_log = logging.getLogger(__name__)


@dataclass
class RayMetrics:
    """Publishes where a run stands, with its id as the label `run`. Ranks know nothing of it."""

    run: str
    """Its id."""
    vitals: Vitals
    is_ready: Callable[[], bool]
    """Whether Ray is there."""
    say: Callable[[str], None]
    _gauges: dict[str, Any] = field(default_factory=dict[str, Any])
    _counters: dict[str, Any] = field(default_factory=dict[str, Any])
    _counted: dict[str, float] = field(default_factory=dict[str, float])
    _failed: bool = False

    def update(self, events: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]) -> None:
        """Take new records and publish the present values, whatever number of steps it was: calls in memory, which Ray collects now and then."""
        if self._failed:
            return
        try:
            self.vitals.take_events(events)
            self.vitals.take_steps(steps)
            if self.is_ready():
                self._publish()
        except Exception as error:  # noqa: BLE001  # what is shown of a run must not end it, and what is read is only shown
            _log.exception("the run's metrics are not published any more")
            self.say(f"  metrics for Prometheus are not published any more: {type(error).__name__}: {error}")
            self._failed = True

    def _publish(self) -> None:
        import ray

        if not ray.is_initialized():  # it has ended just now, and who asked it anything would start another
            return
        if not self._gauges:
            self._begin(ray)
        for name, value in self.vitals.gauges.items():
            self._gauges[name].set(value)
        for name, total in self.vitals.totals.items():
            if (growth := total - self._counted.get(name, 0.0)) > 0:  # Ray refuses to count nothing
                self._counters[name].inc(growth)
                self._counted[name] = total

    def _begin(self, ray: Any) -> None:
        """Make the metrics, and say where they can be read."""
        from ray.util.metrics import Counter, Gauge

        def make(kind: Any, meanings: Mapping[str, str]) -> dict[str, Any]:
            made = {name: kind(PREFIX + name, description=meaning, tag_keys=("run",)) for name, meaning in meanings.items()}
            return {name: metric.set_default_tags({"run": self.run}) for name, metric in made.items()}

        self._gauges, self._counters = make(Gauge, {**OF_RUN, **OF_STEP}), make(Counter, TOTALS)
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here and (node.get("MetricsExportPort") or 0) > 0:
                self.say(f"  metrics for Prometheus: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
