"""Send every node so many bytes and print, a line a node, what came back."""

from __future__ import annotations

import json
import time

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    data = bytes(i % 251 for i in range(int(context.run_config["size"])))
    names = {node.node_id: node.name for node in grid.get_nodes()}
    record = ArrayRecord({"data": Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)})
    out = [Message(RecordDict({"data": record, "told": ConfigRecord({"name": name})}), id, "train") for id, name in names.items()]
    waiting = set(grid.push_messages(out))
    while waiting:
        for message in grid.pull_messages(waiting):
            waiting.discard(message.metadata.reply_to_message_id)
            name = names[message.metadata.src_node_id]
            if message.has_error():
                print("echo", json.dumps({"name": name, "error": message.error.code, "reason": message.error.reason}), flush=True)
                continue
            same = message.content["data"]["data"].data == data
            print("echo", json.dumps({"name": name, "same": same, **message.content["seen"]}), flush=True)
        time.sleep(0.1)
