"""What every Python reads first that the tests start: conftest.py puts this folder on PYTHONPATH.

Such a process lives for seconds, and of its objects nearly all are the frameworks' modules. To look
for cycles among them, while they are imported and again at the end, is a third of its time.
"""

import atexit
import gc

gc.set_threshold(50_000, 20, 20)
atexit.register(gc.freeze)
