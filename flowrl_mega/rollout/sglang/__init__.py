"""Everything that knows SGLang: its HTTP endpoints, its servers' processes and flags, and how it takes weights.

`endpoints.py` has one coroutine per HTTP endpoint and is the only file with paths in it. The queue of prompts
(rollout/dispatch.py) and the health of servers (rollout/health.py) reach a server through rollout/server_client.py's
protocol, and the weight sync through the coroutines of SglangServer; another engine gives its own client to them.
"""
