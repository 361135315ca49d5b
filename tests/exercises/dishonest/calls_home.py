"""Asks somebody on the network for the answer, or at least whether there is a network.

ex03, stopped by: namespace
"""

import socket

with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
    pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(("192.0.2.1", 9))  # no packet is sent: this only asks for a route
