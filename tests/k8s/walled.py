"""`python -m tests.k8s.walled`: the cpu overlay with its NetworkPolicies in force. Needs root.

Each Pod is in a network namespace of its own, whose firewall is made from the policies. Prints what was seen as one
JSON object.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

from pdserve.v1 import types_pb2
from tests.support.kubelet import Pod
from tests.support.kubernetes import Kubernetes
from tests.support.manifests import Manifests, matches, render
from tests.support.network import Host, private_network
from tests.support.streams import Stream

_DIAL = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0)"


def wall(manifests: Manifests, pod: Pod, host: Host, others: list[Pod]) -> None:
    """The policies that select `pod`, as rules of its host: the rest is dropped. Its node is the bridge."""
    rules = ["-P INPUT DROP", "-A INPUT -i lo -j ACCEPT", "-A INPUT -s 10.77.0.1 -j ACCEPT"]
    rules.append("-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT")
    for policy in (one["spec"] for one in manifests.of_kind("NetworkPolicy")):
        if not matches(policy["podSelector"], pod.labels):
            continue
        for rule in policy.get("ingress", ()):
            selectors = [peer["podSelector"] for peer in rule.get("from", ()) if "podSelector" in peer]
            sources = [one.ip for one in others if any(matches(selector, one.labels) for selector in selectors)]
            for source in sources if "from" in rule else ["0.0.0.0/0"]:
                for port in rule["ports"]:
                    ports = f"{port['port']}:{port.get('endPort', port['port'])}"
                    rules.append(f"-A INPUT -p tcp -s {source} --dport {ports} -j ACCEPT")
    for one in rules:
        subprocess.run([*host.command, "iptables", *one.split()], check=True)


def set_sysctls(pod: Pod, host: Host) -> None:
    """Those of the Pod's security context, in its network namespace."""
    [container, *_] = pod.containers
    for one in container.pod["securityContext"].get("sysctls", ()):
        path = "/proc/sys/" + one["name"].replace(".", "/")
        subprocess.run([*host.command, "sh", "-c", f"echo '{one['value']}' > {path}"], check=True)


def listening(host: Host) -> set[int]:
    """TCP ports on which something listens there."""
    told = subprocess.run([*host.command, "ss", "-Htln"], check=True, capture_output=True, text=True).stdout
    return {int(port) for port in re.findall(r":(\d+)\s+\S+:\*", told)}


def gets_through(host: Host, ip: str, port: int) -> bool:
    return (
        subprocess.run([*host.command, sys.executable, "-c", _DIAL, ip, str(port)], capture_output=True).returncode == 0
    )


def main() -> None:
    manifests = render("overlays/cpu", "network-policies")
    with private_network(4) as hosts, Kubernetes(hosts=hosts) as cluster:

        def before_start(pods: list[Pod]) -> None:
            for pod, host in zip(pods, hosts, strict=False):
                set_sysctls(pod, host)
                wall(manifests, pod, host, pods)

        cluster.apply(manifests, replicas={"router": 1, "prefill": 1, "decode": 1}, before_start=before_start)
        router = SimpleNamespace(address=cluster.address("router"))
        path = Stream(router, max_tokens=4).read().path
        of = {pod.name.partition("-")[0]: (pod, host) for pod, host in zip(cluster.all_pods, hosts, strict=False)}
        declared = {
            role: {port for container in pod.containers for port in container.ports.values()}
            for role, (pod, _) in of.items()
        }
        chosen = {role: sorted(listening(host) - declared[role]) for role, (_, host) in of.items()}
        stranger = hosts[3]
        grpc_ports = {role: pod.containers[0].ports["grpc"] for role, (pod, _) in of.items()}
        seen = {
            "kv_path": types_pb2.KvPath.Name(path.kv_path),
            "kv_transport": path.kv_transport,
            "chosen_ports": chosen,
            "stranger_reaches": {
                role: gets_through(stranger, of[role][0].ip, port) for role, port in grpc_ports.items()
            },
            "stranger_reaches_kv": [
                gets_through(stranger, of[role][0].ip, port) for role in ("prefill", "decode") for port in chosen[role]
            ],
            "router_reaches_kv": [
                gets_through(of["router"][1], of[role][0].ip, port)
                for role in ("prefill", "decode")
                for port in chosen[role]
            ],
        }
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
