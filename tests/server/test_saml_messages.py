"""Which answers of an identity provider get in: one that is right in all respects, and no other.

Each forged one is refused by a sentence. That the wrapped ones would fool somebody is shown on a
careless reader.
"""

import base64
import copy
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import pytest
import xmlsec
from lxml import etree

from gpustack.config.load import load
from gpustack.server.auth.saml import ServiceProvider, asked_for, new_browser_secret, request_id
from gpustack.server.auth.saml_messages import MESSAGE_BYTES, Refused, decoded
from tests.support.saml_messages import (
    CALLBACK,
    DS,
    IDP,
    NS,
    PERSISTENT,
    SP,
    UNSPECIFIED,
    Answer,
    Element,
    assertion,
    at,
    careless,
    encrypted,
    form,
    logout_request,
    pair,
    response,
    sign,
    signed,
    wrapped,
)

SP_PAIR, IDP_PAIR, OTHER = pair("sp"), pair("idp"), pair("other")
OPTIONS = {
    "saml_idp_server_url": "https://idp.example/sso?tenant=1&app=2",
    "saml_idp_entity_id": IDP,
    "saml_idp_x509_cert": IDP_PAIR.certificate,
    "saml_sp_entity_id": SP,
    "saml_sp_acs_url": CALLBACK,
    "saml_sp_x509_cert": SP_PAIR.certificate,
    "saml_sp_private_key": SP_PAIR.key,
}
VICTIM = "admin"


def provider(place: Path, **options: Any) -> ServiceProvider:
    return ServiceProvider(load(OPTIONS | {"data_dir": str(place)} | options, {}).settings)


@pytest.fixture(scope="module")
def sp(tmp_path_factory: pytest.TempPathFactory) -> ServiceProvider:
    return provider(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="module")
def slo(tmp_path_factory: pytest.TempPathFactory) -> ServiceProvider:
    place = tmp_path_factory.mktemp("slo")
    return provider(place, saml_idp_logout_url="https://idp.example/slo")


def refusal(sp: ServiceProvider, root: Element | bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        sp.accept(form(root))
    assert caught.value.sentence[0].islower()
    assert ": " in caught.value.sentence or ", " in caught.value.sentence  # says what to do
    return caught.value


def _key_beside() -> Element:
    """Encrypted, the key beside what it is for, as some identity providers have it."""
    root = etree.fromstring(etree.tostring(encrypted(signed(Answer(), IDP_PAIR), SP_PAIR)))
    (key,) = root.iterfind(".//{*}EncryptedKey")
    info, data = key.getparent(), key.getparent().getparent()
    data.getparent().append(key)
    key.set("Id", "_key")
    link = etree.SubElement(info, f"{{{DS}}}RetrievalMethod", URI="#_key")
    link.set("Type", "http://www.w3.org/2001/04/xmlenc#EncryptedKey")
    return root


# --- good ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: signed(Answer(), IDP_PAIR),
        lambda: signed(Answer(), IDP_PAIR, message=True),
        lambda: encrypted(signed(Answer(), IDP_PAIR), SP_PAIR),
        _key_beside,
        lambda: signed(Answer().but(destination=None), IDP_PAIR),
    ],
    ids=["assertion-signed", "both-signed", "encrypted", "key-beside", "without-destination"],
)
def test_a_good_answer_gets_in(sp: ServiceProvider, make: Callable[[], Element]) -> None:
    said = sp.accept(form(make()))
    assert said.name_id == {"Value": "alice", "Format": PERSISTENT}
    assert (said.request_id, said.session_index) == ("_request", "_session")
    assert dict(said.attributes) == {"email": ["alice@example.org"], "name": ["Alice"]}


def test_one_of_several_certificates_is_enough(tmp_path: Path) -> None:
    both = provider(tmp_path, saml_idp_x509_cert=OTHER.certificate + IDP_PAIR.certificate)
    for by in (OTHER, IDP_PAIR):
        assert both.accept(form(signed(Answer(), by))).name_id["Value"] == "alice"


@pytest.mark.parametrize("message", ["assertion", "encrypted"])
def test_a_comment_divides_no_name(sp: ServiceProvider, message: str) -> None:
    """`admin.evil.example` must not become `admin`, though signatures ignore comments."""
    root = signed(Answer(name_id="admin.evil.example"), IDP_PAIR)
    name = assertion(root).find(".//saml:NameID", NS)
    name.text = "admin"
    comment = etree.Comment("")
    comment.tail = ".evil.example"
    name.append(comment)
    if message == "encrypted":
        root = encrypted(root, SP_PAIR)
    assert sp.accept(form(root)).name_id["Value"] == "admin.evil.example"


# --- who they are of -------------------------------------------------------------------------


def test_a_value_is_somebodys_within_its_format_and_for_its_qualifiers(
    sp: ServiceProvider, slo: ServiceProvider
) -> None:
    email = "urn:oasis:names:tc:SAML:1.1:nameid-format:emailAddress"
    same: list[dict[str, str | None]] = [
        {}, {"name_qualifier": IDP}, {"sp_name_qualifier": SP},
    ]  # fmt: skip
    others: list[dict[str, str | None]] = [
        {"name_id": "bob"}, {"format": email}, {"format": None},
        {"name_qualifier": "a!"}, {"name_qualifier": "a%21"}, {"name_qualifier": "a"},
        {"name_id": "!alice"}, {"name_qualifier": "a", "name_id": "!alice"},
    ]  # fmt: skip

    def subject(changes: dict[str, str | None]) -> str:
        return sp.accept(form(signed(Answer().but(**changes), IDP_PAIR))).subject

    assert {subject(one) for one in same} == {f"{PERSISTENT}!!!alice"}
    assert len({subject(one) for one in [{}, *others]}) == len(others) + 1
    assert subject({"format": None}) == subject({"format": UNSPECIFIED})
    for format in (PERSISTENT, email, None):
        asked = slo.accept_logout(logout_request(IDP_PAIR, format=format))
        assert asked.subject == subject({"format": format})
    others_of = logout_request(IDP_PAIR, sp_name_qualifier="https://other.example")
    assert slo.accept_logout(others_of).subject != subject({})


# --- what they say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"audience": "https://other.example"}, "for another service"),
        ({"audience": None}, "for another service"),
        ({"recipient": "https://other.example/auth/saml/callback"}, "cannot be accepted"),
        ({"recipient": CALLBACK + "/evil"}, "for another service"),
        ({"recipient": None}, "for another service"),
        ({"destination": "https://other.example/auth/saml/callback"}, "for another service"),
        ({"destination": CALLBACK + ".evil.example"}, "for another service"),
        ({"destination": ""}, "for another service"),
        ({"issuer": "https://other.example"}, "another identity provider"),
        ({"issuer": ""}, "another identity provider"),
        ({"request": "_other"}, "cannot be accepted"),
        ({"confirmed_request": "_other"}, "cannot be accepted"),
        ({"request": None}, "nobody asked"),
        ({"confirmed_request": None}, "nobody asked"),
        ({"request": None, "confirmed_request": None}, "nobody asked"),
        ({"request": "_" * 66, "confirmed_request": "_" * 66}, "nobody asked"),
        ({"not_on_or_after": -400}, "clocks"),
        ({"not_before": 900}, "clocks"),
        ({"confirmed_until": -5}, "cannot be accepted"),
        ({"confirmed_until": None}, "clocks"),
        ({"status": "urn:oasis:names:tc:SAML:2.0:status:Responder"}, "did not log you in"),
        ({"format": "urn:oasis:names:tc:SAML:2.0:nameid-format:transient"}, "persistent"),
        ({"name_id": ""}, "cannot be accepted"),
        ({"attributes": (("role", "a"), ("role", "b"))}, "allowRepeatAttributeName"),
    ],
    ids=str,
)
def test_an_answer_that_is_wrong_in_one_thing_does_not(
    sp: ServiceProvider, changes: dict[str, Any], part: str
) -> None:
    said = {key: at(one) if isinstance(one, int) else one for key, one in changes.items()}
    assert part in refusal(sp, signed(Answer().but(**said), IDP_PAIR)).sentence


# --- how they are signed ---------------------------------------------------------------------


def _changed_after() -> Element:
    root = signed(Answer(), IDP_PAIR)
    assertion(root).find(".//saml:NameID", NS).text = VICTIM
    return root


def _signature_of_the_other_element() -> Element:
    """The assertion carries a signature that is right, and of the response's issuer's holder."""
    root = response(Answer())
    sign(root, IDP_PAIR)
    signature = root.find("ds:Signature", NS)
    root.remove(signature)
    assertion(root).insert(1, signature)
    return root


def _signed_as_a_whole() -> Element:
    root = response(Answer())
    sign(assertion(root), IDP_PAIR, uri="")
    return root


def _encrypted_unsigned() -> Element:
    return encrypted(response(Answer()), SP_PAIR)


_HMAC = b'Algorithm="http://www.w3.org/2001/04/xmldsig-more#hmac-sha256"'
_RSA = b'Algorithm="http://www.w3.org/2001/04/xmldsig-more#rsa-sha256"'
CONSTANTS = xmlsec.constants


@pytest.mark.parametrize(
    "make",
    [
        lambda: response(Answer()),
        lambda: signed(Answer(), IDP_PAIR, message=True, assertions=False),
        lambda: signed(Answer(), OTHER),
        lambda: signed(Answer(), OTHER, message=True),
        _changed_after,
        _signature_of_the_other_element,
        _signed_as_a_whole,
        _encrypted_unsigned,
        lambda: encrypted(signed(Answer(), OTHER), SP_PAIR),
        lambda: sign(_encrypted_unsigned(), IDP_PAIR),
        lambda: etree.fromstring(etree.tostring(signed(Answer(), IDP_PAIR)).replace(_RSA, _HMAC)),
    ],
    ids=[
        "unsigned", "message-alone", "other-key", "other-key-both", "changed-after",
        "signature-of-another-element", "signature-of-all", "encrypted-unsigned",
        "encrypted-other-key", "encrypted-message-alone", "hmac-for-rsa",
    ],
)  # fmt: skip
def test_an_answer_that_is_not_signed_right_does_not(
    sp: ServiceProvider, make: Callable[[], Element]
) -> None:
    assert "not signed as it must be" in refusal(sp, make()).sentence


@pytest.mark.parametrize(
    ("algorithm", "digest"),
    [
        (CONSTANTS.TransformRsaSha1, CONSTANTS.TransformSha256),
        (CONSTANTS.TransformRsaSha256, CONSTANTS.TransformSha1),
    ],
    ids=["signature", "digest"],
)
def test_sha_1_is_refused_and_its_likes_of_today_are_not(
    sp: ServiceProvider, algorithm: Any, digest: Any
) -> None:
    weak, strong = response(Answer()), response(Answer())
    sign(assertion(weak), IDP_PAIR, algorithm=algorithm, digest=digest)
    assert "SHA-256 or better" in refusal(sp, weak).sentence
    sign(assertion(strong), IDP_PAIR, algorithm=CONSTANTS.TransformRsaSha512,
         digest=CONSTANTS.TransformSha512)  # fmt: skip
    assert sp.accept(form(strong)).name_id["Value"] == "alice"


def test_keys_are_not_encrypted_in_a_way_that_lets_strangers_decrypt(sp: ServiceProvider) -> None:
    root = encrypted(signed(Answer(), IDP_PAIR), SP_PAIR, transport=CONSTANTS.TransformRsaPkcs1)
    assert "rsa-1_5" in refusal(sp, root).reason


def test_what_is_encrypted_is_so_by_aes(sp: ServiceProvider) -> None:
    """By RSA, strangers could ask what a key decrypts, past the list of ways to encrypt keys."""
    good = etree.tostring(encrypted(signed(Answer(), IDP_PAIR), SP_PAIR))
    aes = b"http://www.w3.org/2009/xmlenc11#aes256-gcm"
    assert aes in good
    for other in ("rsa-1_5", "rsa-oaep-mgf1p", "tripledes-cbc"):
        forged = good.replace(aes, f"http://www.w3.org/2001/04/xmlenc#{other}".encode())
        assert refusal(sp, forged).reason.endswith(f"#{other} is not taken")


_XENC = 'xmlns:xenc="http://www.w3.org/2001/04/xmlenc#"'
_AWAY = 'URI="file:///nowhere/gpustack"'
_REFERENCE = f"<xenc:CipherReference {_XENC} {_AWAY}/>"
#: What is put in front of the key's own KeyInfo, or instead of the encrypted bytes -> its name.
_LEADING_AWAY = {
    _REFERENCE: "CipherReference",
    f'<ds:RetrievalMethod xmlns:ds="{DS}" {_AWAY} '
    'Type="http://www.w3.org/2001/04/xmlenc#EncryptedKey"/>': "RetrievalMethod",
    f'<ds:RetrievalMethod xmlns:ds="{DS}" URI="#xpointer(//x)" '
    'Type="http://www.w3.org/2001/04/xmlenc#EncryptedKey"/>': "RetrievalMethod",
    f'<ds:RetrievalMethod xmlns:ds="{DS}" URI="#x"><ds:Transforms/></ds:RetrievalMethod>': (
        "RetrievalMethod"
    ),
    '<x:KeyInfoReference xmlns:x="http://www.w3.org/2009/xmldsig11#" '
    f"{_AWAY}/>": "KeyInfoReference",
    '<x:DerivedKey xmlns:x="http://www.w3.org/2009/xmlenc11#"/>': "DerivedKey",
    f"<xenc:AgreementMethod {_XENC}/>": "AgreementMethod",
}


@pytest.mark.parametrize("placed", _LEADING_AWAY, ids=range(len(_LEADING_AWAY)))
def test_no_file_is_opened_for_a_stranger(sp: ServiceProvider, placed: str) -> None:
    """Nor a key computed for as long as he says. /dev/zero would be read to the end."""
    root = etree.fromstring(etree.tostring(encrypted(signed(Answer(), IDP_PAIR), SP_PAIR)))
    node = etree.fromstring(placed)
    if placed == _REFERENCE:
        (data,) = root.iterfind(".//{*}EncryptedData/{*}CipherData")
        data[:] = [node]
    else:
        root.find(".//{*}EncryptedData/{*}KeyInfo").insert(0, node)
    assert refusal(sp, root).reason.startswith(_LEADING_AWAY[placed])


@pytest.mark.parametrize("number", range(1, 9), ids=lambda number: f"xsw{number}")
def test_wrapped_signatures_fool_the_careless_only(sp: ServiceProvider, number: int) -> None:
    good = signed(Answer(), IDP_PAIR, message=number <= 2, assertions=number > 2)
    forged = wrapped(number, good, VICTIM)
    assert careless(forged, IDP_PAIR.certificate) == VICTIM
    with pytest.raises(Refused):
        sp.accept(form(forged))


# --- what is no message ----------------------------------------------------------------------


def test_xml_that_brings_declarations_is_not_read(sp: ServiceProvider, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    plain = etree.tostring(signed(Answer(), IDP_PAIR))
    for declared in (
        f'<!DOCTYPE x [<!ENTITY e SYSTEM "{secret.as_uri()}">]>',
        '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">',
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY e "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
    ):
        forged = declared.encode() + plain.replace(b">alice<", b">&e;<")
        caught = refusal(sp, forged)
        assert "hunter2" not in caught.reason + caught.sentence


@pytest.mark.parametrize(
    "sent",
    [
        "", "%%%", "bm8gWE1M", form(b"<x/>"), form(b"<x" + b" " * MESSAGE_BYTES + b"/>"),
        form(etree.tostring(response(Answer())).decode().encode("utf-16")),
        form(etree.tostring(assertion(signed(Answer(), IDP_PAIR)))),
    ],
    ids=["nothing", "no-base64", "no-xml", "another-root", "long", "utf-16", "assertion-alone"],
)  # fmt: skip
def test_what_is_no_message_is_refused(sp: ServiceProvider, sent: str) -> None:
    with pytest.raises(Refused):
        sp.accept(sent)


@pytest.mark.parametrize("deflated", [False, True])
def test_messages_have_a_size_however_few_bytes_they_come_in(deflated: bool) -> None:
    for size, fits in ((MESSAGE_BYTES, True), (MESSAGE_BYTES + 1, False), (2**26, False)):
        xml = b" " * size
        sent = base64.b64encode(zlib.compress(xml)[2:-4] if deflated else xml).decode()
        if fits:
            assert decoded(sent, deflated=deflated) == xml
        else:
            with pytest.raises(Refused, match=f"more than {MESSAGE_BYTES} bytes"):
                decoded(sent, deflated=deflated)


def test_whatever_is_done_to_a_good_answer_it_says_the_same_or_is_refused(
    sp: ServiceProvider,
) -> None:
    """Elements lost, doubled, moved and renamed, texts and attributes changed: with a seed."""
    chance = random.Random(7)
    good = [
        etree.tostring(signed(Answer(), IDP_PAIR)),
        etree.tostring(signed(Answer(), IDP_PAIR, message=True)),
        etree.tostring(encrypted(signed(Answer(), IDP_PAIR), SP_PAIR)),
    ]
    taken = 0
    for n in range(300):
        root = etree.fromstring(good[n % 3])
        root = changed(root, chance)
        try:
            said = sp.accept(form(root))
        except Refused:
            continue
        taken += 1
        assert (said.name_id["Value"], said.request_id) == ("alice", "_request")
        assert dict(said.attributes) == {"email": ["alice@example.org"], "name": ["Alice"]}
    assert 0 < taken < 150  # what is not signed may be anything


def changed(root: Element, chance: random.Random) -> Element:
    """One thing of it."""
    one, other = chance.choices([*root.iter()], k=2)
    parent = one.getparent()
    match chance.randrange(6):
        case 0 if parent is not None:
            parent.remove(one)
        case 1 if parent is not None:
            parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(one))
        case 2 if parent is not None and other not in {*one.iter()}:
            other.append(one)
        case 3:
            one.tag = other.tag
        case 4 if one.attrib:
            one.set(
                chance.choice([*one.attrib]),
                chance.choice([VICTIM, "", "2026-01-01T00:00:00+01:00"]),
            )
        case 5:
            return copy.deepcopy(one)  # it is all that there is
        case _:
            one.text = VICTIM
    return root


# --- by a query ------------------------------------------------------------------------------


def refused_logout(slo: ServiceProvider, query: str) -> Refused:
    with pytest.raises(Refused) as caught:
        slo.accept_logout(query)
    return caught.value


@pytest.mark.parametrize("name", ["SAMLRequest", "RelayState", "SigAlg", "Signature"])
def test_a_query_cannot_be_read_in_two_ways(slo: ServiceProvider, name: str) -> None:
    """The signature is of the names as they are written: another's must not carry a forged one."""
    own, forged = (logout_request(IDP_PAIR), logout_request(OTHER, name_id=VICTIM))
    assert slo.accept_logout(own).id == "_logout"
    value = quote(parse_qs(forged)[name][0], safe="")
    hidden = f"%{ord(name[0]):02x}{name[1:]}"
    for query in (
        f"{own}&{hidden}={value}",
        f"{hidden}={value}&{own}",
        f"{own}&{name}={value}",
        own.replace(f"{name}=", f"{hidden}="),
        f"{own}&{name}",
    ):
        assert refused_logout(slo, query).reason.startswith(f"{name} is there twice"), query


def test_a_query_is_signed_as_it_says(slo: ServiceProvider) -> None:
    """The library takes ECDSA for RSA."""
    query = logout_request(IDP_PAIR, algorithm="ecdsa-sha256")
    assert refused_logout(slo, query).reason.endswith("#ecdsa-sha256")


def test_no_file_is_opened_for_a_logout(slo: ServiceProvider) -> None:
    key = f'<ds:KeyInfo xmlns:ds="{DS}"><ds:KeyName>x</ds:KeyName></ds:KeyInfo>'
    method = '<xenc:EncryptionMethod Algorithm="http://www.w3.org/2009/xmlenc11#aes256-gcm"/>'
    data = (
        f"<xenc:EncryptedData {_XENC}>{method}{key}<xenc:CipherData>{_REFERENCE}</xenc:CipherData>"
        "</xenc:EncryptedData>"
    )
    refused = refused_logout(slo, logout_request(IDP_PAIR, encrypted_id=data))
    assert refused.reason == "CipherReference is not taken"


# --- whose they are --------------------------------------------------------------------------


def test_an_answer_is_the_asking_browsers_for_a_while() -> None:
    mine, others = new_browser_secret(), new_browser_secret()
    assert asked_for(mine, request_id(mine))
    assert not asked_for(others, request_id(mine))
    for stale in ("1." + "0" * 64, "no end", "", "²." + "0" * 64, "9" * 5000 + ".0"):
        assert not asked_for(stale, request_id(stale))


# --- what is sent ----------------------------------------------------------------------------


@pytest.mark.parametrize("has_key", [True, False])
def test_metadata_are_valid_and_say_what_is_wanted(tmp_path: Path, has_key: bool) -> None:
    without = {} if has_key else {"saml_sp_x509_cert": None, "saml_sp_private_key": None}
    made = {key: value for key, value in (OPTIONS | without).items() if value is not None}
    settings = load(made | {"data_dir": str(tmp_path), "saml_sp_entity_id": "https://a/?b&c"}, {})
    root = etree.fromstring(ServiceProvider(settings.settings).metadata)
    md = {"md": "urn:oasis:names:tc:SAML:2.0:metadata"} | NS
    (descriptor,) = root.iterfind("md:SPSSODescriptor", md)
    assert root.get("entityID") == "https://a/?b&c"
    assert root.get("validUntil") is None
    assert descriptor.get("WantAssertionsSigned") == "true"
    assert descriptor.get("AuthnRequestsSigned") == str(has_key).lower()
    assert [one.get("Location") for one in descriptor.iterfind(
        "md:AssertionConsumerService", md
    )] == [CALLBACK]  # fmt: skip
    assert [one.text for one in descriptor.iterfind("md:NameIDFormat", md)] == [PERSISTENT]
    uses = {one.get("use") for one in descriptor.iterfind("md:KeyDescriptor", md)}
    assert uses == ({"signing", "encryption"} if has_key else set())
    signatures = root.findall("ds:Signature", NS)
    assert len(signatures) == has_key
    for signature in signatures:
        context = xmlsec.SignatureContext()
        context.key = xmlsec.Key.from_memory(SP_PAIR.certificate, CONSTANTS.KeyDataFormatCertPem)
        xmlsec.tree.add_ids(root, ["ID"])
        context.verify(signature)
