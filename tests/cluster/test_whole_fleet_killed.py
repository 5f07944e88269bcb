"""Both engines of the fleet are killed at once: nothing is left for requests to go on with.

The last of the files that share the fleet.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from kit.fabric_server import Answer, FabricServer, eventually


def complete(fleet: FabricServer, max_tokens: int) -> Answer:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True}
    return fleet.post("/v1/completions", body)


def test_killed_engines_fail_their_requests_and_are_replaced(fleet: FabricServer) -> None:
    record = fleet.get("/fabric/status").json()
    answers: list[Answer] = []
    runners = [
        threading.Thread(target=lambda: answers.append(complete(fleet, 1900))) for _ in range(4)
    ]
    for runner in runners:
        runner.start()
    eventually(lambda: fleet.gauge("vllm:num_requests_running") > 0)
    time.sleep(0.2)
    for replica in record["replicas"]:
        os.kill(replica["pid"], signal.SIGKILL)
    for runner in runners:
        runner.join()
    for answer in answers:
        assert answer.status in (200, 503), answer.text
        if answer.status == 503:
            assert answer.json()["error"]["message"]
    killed = {replica["replica"] for replica in record["replicas"]}

    def replaced() -> bool:
        now = fleet.get("/fabric/status").json()
        return now["ready"] and not killed & {one["replica"] for one in now["replicas"]}

    eventually(replaced, within_s=120)
    eventually(lambda: complete(fleet, 8).status == 200)
    assert fleet.process.poll() is None
