"""TensorBoard's files of events."""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np


class Events:
    """TensorBoard events, written at once.

    tensorboardX's own writer queues them for a thread, which a full disk ends: then the queue fills up, and the run
    hangs on it without a word. Only its formats are used.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        """Begin a file in `folder` for the steps after `first_step`."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}"
        self._records = RecordWriter(str(folder / name))
        self._put(file_version="brain.Event:2")
        # TensorBoard then forgets the steps after the first one, which a stopped run had gone on to.
        self._put(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers of a step."""
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._put(step=step, summary=scalar(name, value))
        self._records.flush()

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write (H, W, 3) uint8."""
        from tensorboardX.summary import image

        self._put(step=step, summary=image(name, picture, dataformats="HWC"))
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _put(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
