"""Where the training stands on this rank, for whoever watches it."""

import time


class Place:
    """The main thread says where it is at what all ranks do together; ranks in step with each other have equal counts.

    `moved`: when there was progress last, by time.monotonic(). `unsaved`: whether steps would be lost if it ended now.
    """

    def __init__(self) -> None:
        self.count, self.label, self.unsaved = 0, "joining the launch", False
        self.goes_on()

    def at(self, label: str) -> None:
        self.count, self.label = self.count + 1, label
        self.goes_on()

    def goes_on(self) -> None:
        """Some progress, in any thread."""
        self.moved = time.monotonic()

    def seconds(self) -> float:
        """How long it has stood still."""
        return time.monotonic() - self.moved
