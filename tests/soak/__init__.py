"""`make soak`: random clients and random faults for an hour, and invariants that are checked all the time.

contents    the versions of files, and whether bytes are those of one version
ledger      what clients have got, compared with the log of the service: exactly one outcome for each request
site        the service with everything that it needs: upstream, store, Redis, nginx
clients     what clients do, good and bad
faults      what is done to the site, and when
invariants  what is checked of the processes and of the disk
run         rounds of load, faults and quiet moments
"""
