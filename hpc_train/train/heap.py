"""How much memory malloc takes for tensors that come and go: more than is in use at a time, since it leaves gaps."""

from bisect import bisect_left, insort

_FIRST_THRESHOLD, _LARGEST_THRESHOLD = 128 << 10, 32 << 20  # mallopt(3), 64 bits
_PAGE, _OVERHEAD = 4096, 80  # bytes; of an allocation aligned to 64, as torch asks for


class Heap:
    """glibc's malloc as mallopt(3) describes it: the best fitting gap, else the end of the heap, else pages of their own.

    Memory from `threshold` bytes on comes in pages of its own and goes back when it is freed; that raises the threshold
    to its size. All else shares one heap: what is freed there stays with the process, but for a long free end.
    """

    def __init__(self) -> None:
        self.peak = 0  # bytes that the process had at most
        self._threshold = _FIRST_THRESHOLD
        self._end = self._touched = self._paged = 0
        self._gaps: list[tuple[int, int]] = []  # (begin, end), in order of their addresses
        self._used: dict[int, tuple[int, int] | int] = {}  # key -> its place in the heap, or the bytes of its pages

    def allocate(self, key: int, num_bytes: int) -> None:
        size = num_bytes + _OVERHEAD
        fitting = min((gap for gap in self._gaps if gap[1] - gap[0] >= size), key=lambda gap: gap[1] - gap[0], default=None)
        if fitting is not None:
            self._gaps.remove(fitting)
            begin, end = fitting
            if end - begin > size:
                insort(self._gaps, (begin + size, end))
            self._used[key] = begin, begin + size
        elif size >= self._threshold and self._end + size > self._touched:
            self._used[key] = size + -size % _PAGE
            self._paged += size + -size % _PAGE
        else:
            self._used[key] = self._end, self._end + size
            self._end += size
            self._touched = max(self._touched, self._end)
        self.peak = max(self.peak, self._touched + self._paged)

    def free(self, key: int) -> None:
        place = self._used.pop(key)
        if isinstance(place, int):
            self._paged -= place
            if self._threshold < place <= _LARGEST_THRESHOLD:
                self._threshold = place
            return
        begin, end = place
        index = bisect_left(self._gaps, (begin, end))
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end = self._gaps.pop(index)[1]
        if index and self._gaps[index - 1][1] == begin:
            begin = self._gaps.pop(index - 1)[0]
        if end < self._end:
            insort(self._gaps, (begin, end))
            return
        self._end = begin
        if self._touched - self._end >= 2 * self._threshold:  # the end of the heap is returned
            self._touched = self._end
