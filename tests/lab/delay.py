# SPDX-License-Identifier: Apache-2.0
"""A long link: what one network interface receives leaves by another one so many milliseconds later, both ways.

Run as a program, in the namespace of both: delay.py A B MILLISECONDS. It prints "ready" when it forwards, and does so
until it is killed. Packets that the kernel cuts into segments only on a real wire stay whole (virtio's header goes
along), so one that is 64 KiB long costs no more than a small one. Not every kernel has netem, which would do the same.
"""
import queue
import socket
import sys
import threading
import time

ETH_P_ALL = 3
PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE = 15, 23, 33
SOL_PACKET = 263
BUFFER = 64 << 20
LARGEST = 10 + 18 + (1 << 16)


def endpoint(interface):
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    found.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    found.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    found.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    found.bind((interface, ETH_P_ALL))
    return found


def receive(source, waiting, delay):
    while True:
        packet = source.recv(LARGEST)
        waiting.put((time.monotonic() + delay, packet))


def send(target, waiting):
    while True:
        due, packet = waiting.get()
        time.sleep(max(0, due - time.monotonic()))
        target.send(packet)


def main():
    a, b = map(endpoint, sys.argv[1:3])
    for source, target in ((a, b), (b, a)):
        waiting = queue.SimpleQueue()
        threading.Thread(target=receive, args=(source, waiting, float(sys.argv[3]) / 1000)).start()
        threading.Thread(target=send, args=(target, waiting)).start()
    print('ready', flush=True)


if __name__ == '__main__':
    main()
