"""Send back the bytes, and what a client sees of its node."""

from __future__ import annotations

import os

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    if context.node_config.get("fails"):
        raise ValueError("no data today")
    seen = ConfigRecord({"told": message.content["told"]["name"], "data": context.node_config.get("data", ""), "cwd": os.getcwd()})
    return Message(RecordDict({"data": message.content["data"], "seen": seen}), reply_to=message)
