"""A broker of Dynamo's events on the loopback interface, with the ports to publish to and to subscribe to as arguments.
Without a broker, each process listens on all interfaces.
"""

from __future__ import annotations

import sys

import zmq


def main() -> None:
    context = zmq.Context()
    inward, outward = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
    inward.bind(f"tcp://127.0.0.1:{sys.argv[1]}")
    outward.bind(f"tcp://127.0.0.1:{sys.argv[2]}")
    zmq.proxy(inward, outward)


if __name__ == "__main__":
    main()
