"""An emulator of Google's store, as a process of its own: ``python -m tests.stores.gcs PORT``."""

import sys
import threading

from gcp_storage_emulator.server import create_server

if __name__ == "__main__":
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
    threading.Event().wait()
