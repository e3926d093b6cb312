"""How bytes get from one process or machine to another.

A stream of bytes is cut into chunks, of which a few are on their way at a time; each has a checksum and is
repaired alone (FedRDMA).
``peers`` is what others use. From the bytes up:

    frames      headers, acknowledgements and control messages: what travels, and what is refused
    stream      both ends of a stream as state machines, without sockets and clocks
    sources     what is sent, made while earlier chunks travel
    tcp         a connection that carries frames; payloads in line with them
    blocks      memory that processes of one machine share
    shared      payloads in such memory
    ucx         payloads by UCX, which has RDMA where there is some
    handshake   who may come in
    journal     streams in files, which outlast their receiver
    desk        what a receiver has of which streams
    exchange    one stream over one connection, from "open" to "taken"
    peers       a listener, and links to it that outlast their connections

Beside them, to try it on one machine: ``proxy`` is a bad link, ``timing`` the time that a stream takes by the model.
"""
