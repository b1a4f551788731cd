"""TensorBoard, through the class of Accelerate. `Custom Scalars` has the charts in the order of docs/metrics.md."""

import json
import re
from pathlib import Path

from accelerate.tracking import TensorBoardTracker

from core.diagnosis import Verdict
from core.metrics import charts
from core.schema import Config
from launch import heat_map
from launch.shown import shown
from trainer.gallery import Exhibit


class TensorBoard:
    def __init__(self, cfg: Config, folder: Path, resumed_from: int | None) -> None:
        from torch.utils.tensorboard.summary import hparams

        name = folder_name(cfg.log.project)
        purge = None if resumed_from is None else resumed_from + 1
        self._tracker = TensorBoardTracker(name, folder, purge_step=purge)
        self._tracker.start()
        if resumed_from is None:
            # Not `store_init_configuration`: it makes a second run with a clock reading for a name beside this one.
            plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in shown(cfg).items()}
            for summary in hparams(plain, {}):
                self._tracker.tracker.file_writer.add_summary(summary)
            self._tracker.writer.add_custom_scalars(layout(cfg))

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step)

    def alert(self, verdict: Verdict) -> None:
        self._tracker.writer.add_text(f"diagnosis/{verdict.rule}", verdict.text, verdict.step)

    def show(self, exhibit: Exhibit) -> None:
        """Histograms, and responses as text: what stands under Text is cleaned of colours."""
        writer = self._tracker.writer
        for name, h in exhibit.histograms.items():
            writer.add_histogram_raw(
                name,
                min=h.edges[0],
                max=h.edges[-1],
                num=int(h.counts.sum()),
                sum=h.total,
                sum_squares=h.squares,
                bucket_limits=h.edges[1:].tolist(),
                bucket_counts=h.counts.tolist(),
                global_step=exhibit.step,
            )
        for i, sample in enumerate(exhibit.samples):
            writer.add_text(f"samples/{i}", heat_map.markdown(sample), exhibit.step)

    def checkpoint(self, folder: Path, step: int) -> None:
        """Nothing: TensorBoard keeps no files."""

    def close(self, exit_code: int) -> None:
        self._tracker.finish()


def folder_name(project: str) -> str:
    """A project may hold anything, "/" and ".." too; this folder stays inside the run's."""
    return re.sub(r"[^\w.-]+", "_", project).strip(".") or "tensorboard"


def layout(cfg: Config) -> dict[str, dict[str, list]]:
    """Section of docs/metrics.md -> chart -> what it draws, in their order; a metric of all components is one chart."""
    return {
        title: {chart: ["Multiline", [f"^{re.escape(name)}$" for name in names]] for chart, names in section.items()}
        for title, section in charts(cfg.rewards).items()
    }
