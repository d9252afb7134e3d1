"""`make cluster`: three replicas and all that they need, as processes of this machine, and what happens when one fails.

contents    the files, and their bytes
nodes       one process of the cluster: started, killed, stopped, and started again
site        the whole cluster: Redis, PostgreSQL, SeaweedFS, caches, replicas, and the proxy in front
driver      downloads, each of which is begun, cut, resumed and checked as a client would do it
load        what clients do: whole files, ranges, resumes, archives, links, quotas, listings, cold files
scenarios   what is done to the cluster, and what that may excuse
invariants  what has to hold afterwards: bytes, uses, quotas, fills, completions, outcomes
costs       CPU seconds, operations of Redis and requests to the store, for each kind of request
page        docs/cluster.md and its pictures
"""
