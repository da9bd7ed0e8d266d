"""What a command ends with, the same for all of them."""

DONE = 0
"""Everything was done."""

FAILED = 1
"""A run failed on good input: it diverged, the disk is full, memory ran out, a process of the run was lost."""

BAD_INPUT = 2
"""A flag, file or folder is wrong; also when some files of a folder were bad and all others were done."""

INTERNAL = 70
"""A fault of the program."""

INTERRUPTED = 130
"""Stopped by Ctrl-C or SIGTERM; the same command continues where that makes sense."""

READER_GONE = 141
"""Whoever read the output stopped reading, as in `| head -1`. Nothing is said, as by other programs."""
