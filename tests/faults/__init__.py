"""Real faults in real processes, and what clients get meanwhile and afterwards.

strace makes system calls of a running service fail, a FUSE file system fails or hangs, disks are full or read-only,
peers are stopped (SIGSTOP), the clock leaps (libfaketime), `/proc` and directories are missing. Where a machine lacks
what a test needs, the test is skipped and names it. These are the cases, and where each is tested:

- a system call fails: `test_system_calls`; it is refused from the start or later: `tests.asgi.test_refused_calls`
- short reads, EIO at any read, a disk that hangs: `test_disks`, `tests.asgi.test_slow_disk`, `tests.sources.test_root`
- a full disk: `test_disks`, `tests.sources.test_cached_disk`
- a read-only system, no `/proc`, no directory for temporary files: `test_sandbox`
- no descriptors: `tests.test_attacks`
- an upstream, a store or a database is stopped, dies, comes back: `test_peers`, `tests.sources.test_upstreams`,
  `tests.policy.test_stores`, `tests.accounts.test_completions`
- a name server does not answer: `test_names`
- the clock leaps: `test_clock`
- files that change while they are sent: `test_changing_files`, `tests.asgi.test_transfer`, `tests.sources.test_archive`
- clients that stop reading, leave or attack: `tests.asgi.test_watch`, `tests.asgi.test_wire`, `tests.test_attacks`
- the end of the service: `tests.service.test_drain`, `tests.service.test_restarts`
- paths, links, SSRF, offload: `tests.test_attacks`, `tests.sources.test_ssrf`, `tests.policy`, `tests.proxies`
"""
