"""The options of SAML: certificates and keys in every form, and what is wrong said at the start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpustack.config.load import load
from gpustack.config.saml import certificates, private_key, security
from gpustack.errors import SettingsError
from tests.support.saml_messages import CALLBACK, pair

IDP, SP = pair("idp"), pair("sp")
OPTIONS = {
    "saml_idp_server_url": "https://idp.example/sso",
    "saml_idp_entity_id": "https://idp.example/metadata",
    "saml_idp_x509_cert": IDP.certificate,
    "saml_sp_entity_id": "https://gpu.example/sp",
    "saml_sp_acs_url": CALLBACK,
}


def bare(pem: str) -> str:
    """One line of base64, as identity providers' metadata have it."""
    return "".join(pem.splitlines()[1:-1])


def forms(pem: str, place: Path) -> list[str]:
    (place / "pem").write_text(pem)
    (place / "bare").write_text(bare(pem) + "\n")
    lines = pem.strip().splitlines()
    return [
        pem, bare(pem), "\n".join(lines[1:-1]), pem.replace("\n", "\\n"), "".join(lines),
        str(place / "pem"), str(place / "bare"),
    ]  # fmt: skip


def test_certificates_and_keys_are_taken_in_every_form(tmp_path: Path) -> None:
    assert [certificates(one) for one in forms(SP.certificate, tmp_path)] == [[SP.certificate]] * 7
    for one in forms(SP.key, tmp_path):
        assert private_key(one, SP.certificate) == SP.key
    assert certificates(IDP.certificate + SP.certificate) == [IDP.certificate, SP.certificate]


def problems(**changes: Any) -> str:
    given = {key: value for key, value in (OPTIONS | changes).items() if value is not None}
    with pytest.raises(SettingsError) as caught:
        load(given, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"saml_sp_entity_id": None}, "needs --saml-sp-entity-id"),
        ({"saml_idp_server_url": None}, "needs --saml-idp-server-url"),
        ({"saml_sp_x509_cert": SP.certificate}, "needs --saml-sp-private-key"),
        ({"saml_sp_acs_url": "https://gpu.example/saml"}, "want <server-url>/auth/saml/callback"),
        ({"saml_idp_x509_cert": "/no/such/file"}, "as a path: No such file or directory"),
        ({"saml_idp_x509_cert": "/"}, "as a path: Is a directory"),
        ({"saml_idp_x509_cert": "/dev/null"}, "the file has none"),
        ({"saml_idp_x509_cert": bare(IDP.certificate)[:-8]}, "want a certificate as PEM"),
        ({"saml_idp_x509_cert": IDP.key}, "this PEM is none"),
        (
            {"saml_sp_x509_cert": SP.certificate, "saml_sp_private_key": IDP.key},
            "not the key of --saml-sp-x509-cert",
        ),
        (
            {"saml_sp_x509_cert": SP.certificate, "saml_sp_private_key": bare(SP.key)[:-8]},
            "want an RSA private key",
        ),
        ({"saml_security": '{"wantAssertionsSigned": false}'}, "must be signed, always"),
        ({"saml_security": '{"rejectDeprecatedAlgorithm": false}'}, "SHA-1 prove nothing"),
        ({"saml_security": '{"wantMessageSigned": true}'}, "unknown key 'wantMessageSigned'"),
        ({"saml_security": '{"wantMessagesSigned": 1}'}, "want true or false"),
        ({"saml_security": '{"authnRequestsSigned": true}'}, "needs --saml-sp-private-key"),
        ({"saml_security": '{"signatureAlgorithm": "rsa-sha1"}'}, "want one of http"),
        ({"saml_security": '{"requestedAuthnContext": "x"}'}, "true, false or a list"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_is_said_at_the_start_with_what_would_be_right(
    changes: dict[str, Any], part: str
) -> None:
    said = problems(**changes)
    assert part in said
    assert bare(SP.key)[:40] not in said
    assert bare(IDP.key)[:40] not in said


def test_security_is_merged_over_strict_defaults() -> None:
    plain, keyed = security(None, has_key=False), security(None, has_key=True)
    assert (plain["wantAssertionsSigned"], plain["authnRequestsSigned"]) == (True, False)
    assert (keyed["signMetadata"], keyed["logoutRequestSigned"]) == (True, True)
    merged = security({"wantMessagesSigned": True, "signMetadata": False}, has_key=True)
    assert {key: value for key, value in merged.items() if keyed[key] != value} == {
        "wantMessagesSigned": True, "signMetadata": False,
    }  # fmt: skip


def test_a_worker_alone_needs_none_of_it() -> None:
    assert load({**OPTIONS, "server_url": "http://s", "token": "t", "saml_idp_x509_cert": "x"}, {})


def test_an_installation_without_the_extra_says_how_to_get_it() -> None:
    code = (
        "import sys, json\n"
        "sys.modules['onelogin'] = None\n"
        "from gpustack.config.load import load\n"
        "load(json.loads(sys.argv[1]), {})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(OPTIONS)], capture_output=True, text=True
    )
    assert "--saml-idp-server-url: SAML needs python3-saml" in done.stderr
    assert "pip install 'gpustack[saml]'" in done.stderr


def test_a_start_without_saml_imports_nothing_of_it() -> None:
    code = "import sys, gpustack.server.app; print({'onelogin', 'xmlsec'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
