"""cluster.yaml and the account's template against an AWS that is made up by moto: Ray's own provider uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.client import BaseClient
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
REGION = "us-west-2"


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account in which the template was deployed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        boto3.client("cloudformation", REGION).create_stack(
            StackName="minimind-ray",
            TemplateBody=(ROOT / "cluster/aws-account.cfn").read_text(),
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[
                {"ParameterKey": "Bucket", "ParameterValue": "bucket"},
                {"ParameterKey": "Address", "ParameterValue": "198.51.100.7/32"},
            ],
        )
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The actions that were asked of AWS since it was emptied."""
    seen, call = set[str](), BaseClient._make_api_call  # type: ignore[attr-defined]

    def noted(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        seen.add(f"{self.meta.service_model.service_name}:{operation}")
        return call(self, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", noted)
    return seen


def statements_of(document: Any) -> list[dict[str, Any]]:
    """moto gives an inline policy as text, AWS as a tree."""
    return (yaml.safe_load(document) if isinstance(document, str) else document)["Statement"]


def managed(name: str) -> list[dict[str, Any]]:
    iam = boto3.client("iam", REGION)
    (policy,) = [p for p in iam.list_policies(Scope="Local")["Policies"] if p["PolicyName"] == name]
    version = iam.get_policy_version(PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"])
    return statements_of(version["PolicyVersion"]["Document"])


def head_role() -> list[dict[str, Any]]:
    (name,) = (iam := boto3.client("iam", REGION)).list_role_policies(RoleName="minimind-ray-head")["PolicyNames"]
    return statements_of(iam.get_role_policy(RoleName="minimind-ray-head", PolicyName=name)["PolicyDocument"])


def actions(statements: list[dict[str, Any]]) -> set[str]:
    """What a policy allows, single actions as the one of their list."""
    return {a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}


@pytest.mark.usefixtures("account")
def test_ray_starts_machines_with_the_accounts_group_and_roles(calls: set[str]) -> None:
    calls.clear()
    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    config = AWSNodeProvider.bootstrap_config(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    types = config["available_node_types"]
    provider.create_node({**types["head"]["node_config"], **config["head_node"]}, {TAG_RAY_NODE_KIND: "head"}, 1)
    by_launch = set(calls)
    calls.clear()
    provider.create_node(types["gpu-1-spot"]["node_config"], {TAG_RAY_NODE_KIND: "worker"}, 1)
    by_head = set(calls)
    found = {
        node["InstanceType"]: node
        for reservation in boto3.client("ec2", REGION).describe_instances()["Reservations"]
        for node in reservation["Instances"]
    }
    head, worker = found["m7i.xlarge"], found["g6.2xlarge"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/minimind-ray-head")
    assert worker["IamInstanceProfile"]["Arn"].endswith("/minimind-ray-worker")
    assert worker["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in head
    for node in (head, worker):
        assert [group["GroupName"] for group in node["SecurityGroups"]] == ["minimind-ray"]
        assert {"Key": "ray-cluster-name", "Value": "minimind"} in node["Tags"]
    calls.clear()
    (worker_id,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    provider.terminate_node(worker_id)
    by_both = set(calls)
    assert {"ec2:RunInstances", "ec2:CreateKeyPair"} <= by_launch and "ec2:RunInstances" in by_head
    assert "ec2:TerminateInstances" in by_both
    assert by_launch | by_both <= actions(managed("minimind-ray-launch"))
    assert by_head | by_both <= actions(head_role())


@pytest.mark.usefixtures("account")
def test_only_ssh_from_one_address_and_the_nodes_themselves_are_let_in() -> None:
    (group,) = boto3.client("ec2", REGION).describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["minimind-ray"]}]
    )["SecurityGroups"]
    rules = {rule["IpProtocol"]: rule for rule in group["IpPermissions"]}
    assert set(rules) == {"tcp", "-1"}
    assert (rules["tcp"]["FromPort"], rules["tcp"]["ToPort"]) == (22, 22)
    assert [r["CidrIp"] for r in rules["tcp"]["IpRanges"]] == ["198.51.100.7/32"]
    assert not rules["-1"]["IpRanges"]
    assert [pair["GroupId"] for pair in rules["-1"]["UserIdGroupPairs"]] == [group["GroupId"]]


@pytest.mark.usefixtures("account")
def test_roles_reach_one_bucket_and_workers_nothing_else() -> None:
    iam = boto3.client("iam", REGION)
    assert iam.list_role_policies(RoleName="minimind-ray-worker")["PolicyNames"] == []
    (attached,) = iam.list_attached_role_policies(RoleName="minimind-ray-worker")["AttachedPolicies"]
    statements = managed(attached["PolicyName"])
    assert {s["Resource"] for s in statements} == {"arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"}
    for statements in (head_role(), managed("minimind-ray-launch")):
        (ending,) = [s for s in statements if "ec2:TerminateInstances" in s["Action"]]
        assert ending["Condition"] == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "minimind"}}
        (passing,) = [s for s in statements if s["Action"] == "iam:PassRole"]
        assert "*" not in str(passing["Resource"])
        assert "*" not in str(actions(statements))
