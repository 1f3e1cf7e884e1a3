"""What users import and type: `pdserve.client` talks to a router, `pdserve.worker_client` to one worker, `pdserve.cli`
is the command. The stubs of `protos/` are generated into `pdserve.v1` at install."""
