"""What python3-saml does not check of a message, and what of an assertion is used.

The library verifies the signatures and that they are of what is read, schema, status, issuer and
times. But it takes an assertion without audience, recipient, end or request, compares URLs by their
beginnings, and knows few algorithms to refuse: that is made strict here. Both read the same tree.

All errors are `Refused`; their sentences go to whoever logs in, their reasons to the log.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import parse_qsl

from lxml import etree
from onelogin.saml2.constants import OneLogin_Saml2_Constants as Names
from onelogin.saml2.errors import OneLogin_Saml2_ValidationError as Invalid
from onelogin.saml2.utils import OneLogin_Saml2_Utils as Utils
from onelogin.saml2.xml_utils import OneLogin_Saml2_XML as Xml

from gpustack.config.saml import DIGESTS, RSA_SIGNATURES, SIGNATURES

Element = Any

#: Of a message as XML; one with hundreds of groups has 100 KB.
MESSAGE_BYTES: Final = 256 * 1024
#: Of ours: a digest, after a letter.
REQUEST_ID_LENGTH: Final = 65
#: Of a request to log out, from when it was made; clocks differ.
LOGOUT_LIFE: Final = timedelta(minutes=5)
#: What the redirect binding signs, and the signature.
_OF_QUERY: Final = ("SAMLRequest", "RelayState", "SigAlg", "Signature")
_TRANSFORMS: Final = {
    "http://www.w3.org/2000/09/xmldsig#enveloped-signature",
    "http://www.w3.org/2001/10/xml-exc-c14n#",
    "http://www.w3.org/2001/10/xml-exc-c14n#WithComments",
    "http://www.w3.org/TR/2001/REC-xml-c14n-20010315",
    "http://www.w3.org/TR/2001/REC-xml-c14n-20010315#WithComments",
    "http://www.w3.org/2006/12/xml-c14n11",
}
#: RSA without OAEP lets strangers decrypt by asking often enough.
_KEY_TRANSPORTS: Final = {
    "http://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p",
    "http://www.w3.org/2009/xmlenc11#rsa-oaep",
}
#: Of what is encrypted: never a private key's, which would get around the list above.
_CIPHERS: Final = {
    *(f"http://www.w3.org/2001/04/xmlenc#aes{bits}-cbc" for bits in (128, 192, 256)),
    *(f"http://www.w3.org/2009/xmlenc11#aes{bits}-gcm" for bits in (128, 192, 256)),
}
#: What xmlsec opens files and URLs for, or computes keys with for as long as a stranger says.
_LEADS_ELSEWHERE: Final = {
    "CipherReference", "KeyInfoReference", "DerivedKey", "AgreementMethod",
}  # fmt: skip

_AGAIN: Final = "log in again; if that does not help, "
_UNCLEAR: Final = (
    f"the identity provider's answer cannot be accepted: {_AGAIN}the server's log says to an "
    "administrator what is wrong with it"
)
UNSIGNED: Final = (
    "the identity provider's assertion is not signed as it must be: an administrator has to have "
    "assertions signed there, with SHA-256 or better, by the key of --saml-idp-x509-cert"
)
_TIMES: Final = (
    f"the identity provider's answer is not valid at this time: {_AGAIN}an administrator has to "
    "compare the clocks of both machines"
)
_ELSEWHERE: Final = (
    "the identity provider's answer is for another service: an administrator has to compare "
    "--saml-sp-entity-id and --saml-sp-acs-url with what the identity provider has of this one"
)
_UNASKED: Final = (
    "nobody asked for this answer of the identity provider here: logins begin at this server's "
    "login page, not at the identity provider's"
)
_SENTENCES: Final = {
    Invalid.STATUS_CODE_IS_NOT_SUCCESS: (
        "the identity provider did not log you in: try again, or ask its administrator"
    ),
    Invalid.WRONG_ISSUER: (
        "the answer comes from another identity provider: an administrator has to compare "
        "--saml-idp-entity-id with the issuer of its answers"
    ),
    Invalid.DUPLICATED_ATTRIBUTE_NAME_FOUND: (
        "the identity provider sends an attribute twice: an administrator has to have it sent "
        'once, or to give --saml-security {"allowRepeatAttributeName": true}'
    ),
    **dict.fromkeys(
        (Invalid.NO_SIGNED_ASSERTION, Invalid.NO_SIGNED_MESSAGE, Invalid.NO_SIGNATURE_FOUND,
         Invalid.INVALID_SIGNATURE, Invalid.DEPRECATED_SIGNATURE_METHOD,
         Invalid.DEPRECATED_DIGEST_METHOD),
        UNSIGNED,
    ),
    **dict.fromkeys(
        (Invalid.ASSERTION_TOO_EARLY, Invalid.ASSERTION_EXPIRED, Invalid.SESSION_EXPIRED,
         Invalid.RESPONSE_EXPIRED),
        _TIMES,
    ),
    **dict.fromkeys(
        (Invalid.WRONG_AUDIENCE, Invalid.WRONG_DESTINATION, Invalid.EMPTY_DESTINATION), _ELSEWHERE
    ),
}  # fmt: skip


class Refused(Exception):
    """A message is not taken.

    Attributes:
        sentence: what whoever logs in can do.
        reason: for the log; parts of it may be a stranger's.
    """

    def __init__(self, reason: str, sentence: str = _UNCLEAR) -> None:
        super().__init__(reason)
        self.sentence, self.reason = sentence, reason


def refused(error: Exception) -> Refused:
    """What the library's error means."""
    if isinstance(error, Refused):
        return error
    sentence = _SENTENCES.get(error.code, _UNCLEAR) if isinstance(error, Invalid) else _UNCLEAR
    return Refused(f"{type(error).__name__}: {error}", sentence)


@dataclass(frozen=True)
class Parties:
    """Who talks to whom.

    Attributes:
        callback: where answers to logins must be meant for, word for word.
    """

    idp: str
    sp: str
    callback: str


@dataclass(frozen=True)
class Assertion:
    """What a checked answer says of a user.

    Attributes:
        request_id: of the request that it answers.
        ends_at: it proves nothing from then on.
        subject: for ever the same person's.
        name_id: its Value; Format and qualifiers where there are.
        attributes: values by name; by friendly name where no name is the same.
    """

    id: str
    request_id: str
    ends_at: datetime
    subject: str
    name_id: Mapping[str, str]
    session_index: str | None
    attributes: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Logout:
    """What a checked request to end sessions says.

    Attributes:
        ends_at: it asks for nothing from then on.
        subject: as in the assertion of the login.
        session_indexes: of the sessions that it means; empty: all.
    """

    id: str
    ends_at: datetime
    subject: str
    session_indexes: frozenset[str]


def decoded(text: str, *, deflated: bool = False) -> bytes:
    """The XML of a message.

    Raises:
        Refused: it is too long, or nothing of the kind.
    """
    try:
        raw = base64.b64decode("".join(text.split()), validate=True)
        if deflated:  # a few bytes may stand for gigabytes
            inflater = zlib.decompressobj(-15)
            raw = inflater.decompress(raw, MESSAGE_BYTES + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise Refused(f"no message: {error}") from None
    if len(raw) > MESSAGE_BYTES:
        raise Refused(f"a message of more than {MESSAGE_BYTES} bytes")
    return raw


def tree(xml: bytes) -> Element:
    """Parsed as the library does it: no DTD, no entities, no comments, nothing fetched.

    Raises:
        Refused: it is no XML, or not such.
    """
    try:
        return Xml.to_etree(xml)
    except (ValueError, etree.XMLSyntaxError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from None


def expect_sound(root: Element) -> None:
    """Whatever has to be computed of the message, decryption and signatures, may be.

    Raises:
        Refused: an algorithm is too weak or does not belong here, or files would be opened.
    """
    _expect_within(root)
    for query, ways in (
        ("//xenc:EncryptedKey/xenc:EncryptionMethod", _KEY_TRANSPORTS),
        ("//xenc:EncryptedData/xenc:EncryptionMethod", _CIPHERS),
    ):
        for method in _all(root, query):
            _expect_known(method, ways)
    for signature in _all(root, "//ds:Signature"):
        references = _all(signature, "./ds:SignedInfo/ds:Reference")
        if len(references) != 1:
            raise Refused("a signature with not exactly one reference", UNSIGNED)
        if _all(signature, ".//ds:Object | .//ds:Manifest"):
            raise Refused("a signature with content of its own", UNSIGNED)
        signed = signature.getparent().get("ID")
        if references[0].get("URI") != f"#{signed}":
            raise Refused("a signature of something else than what it is in", UNSIGNED)
        for query, known in (
            (".//ds:SignatureMethod", SIGNATURES),
            (".//ds:DigestMethod", DIGESTS),
            (".//ds:Transform | .//ds:CanonicalizationMethod", _TRANSFORMS),
        ):
            for method in _all(signature, query):
                _expect_known(method, known)


def _expect_within(root: Element) -> None:
    """All that has to be read for it is in it. In any name space: which ones count, xmlsec knows.

    Raises:
        Refused: it is not.
    """
    for node in root.iter("{*}*"):
        name = etree.QName(node).localname
        if name in _LEADS_ELSEWHERE:
            raise Refused(f"{name} is not taken")
        if name == "RetrievalMethod":
            uri = node.get("URI", "")
            if re.fullmatch(r"#[\w.-]+", uri) is None or len(node):
                raise Refused(f"RetrievalMethod of {uri} is not taken")


def _expect_known(method: Element, known: Any) -> None:
    algorithm = method.get("Algorithm")
    if algorithm not in known:
        raise Refused(f"algorithm {algorithm} is not taken", UNSIGNED)


def assertion(response: Any, parties: Parties) -> Assertion:
    """What a response says that the library has found valid.

    Args:
        response: the library's object.

    Raises:
        Refused: it says too little, or is not meant for us.
    """
    root = response.get_xml_document()
    (said,) = _all(root, "/samlp:Response/saml:Assertion")
    if [_text(one) for one in _all(said, "./saml:Issuer")] != [parties.idp]:
        raise Refused("the assertion has another issuer", _SENTENCES[Invalid.WRONG_ISSUER])
    if root.get("Destination") not in {None, parties.callback}:
        raise Refused(f"destination {root.get('Destination')}", _ELSEWHERE)
    _expect_audience(said, parties.sp)
    request_id = root.get("InResponseTo")
    if not request_id or len(request_id) > REQUEST_ID_LENGTH:
        raise Refused("the response answers no request of ours", _UNASKED)
    ends_at = _confirmed_until(said, parties.callback, request_id)
    name_id = response.get_nameid_data()
    if name_id.get("Format") == Names.NAMEID_TRANSIENT:
        raise Refused(
            "a transient NameID",
            "the identity provider sends a new name for the same person at each login: an "
            "administrator has to have it send a persistent NameID",
        )
    return Assertion(
        id=said.get("ID"),
        request_id=request_id,
        ends_at=ends_at,
        subject=_subject(name_id, parties),
        name_id=name_id,
        session_index=response.get_session_index(),
        attributes={**response.get_friendlyname_attributes(), **response.get_attributes()},
    )


def _subject(name_id: Mapping[str, str], parties: Parties) -> str:
    """Who that is: a value names somebody within its format and for its qualifiers alone.

    Qualifiers that say what holds without them are as if they were not there.
    """
    giver, asker = name_id.get("NameQualifier", ""), name_id.get("SPNameQualifier", "")
    parts = (
        name_id.get("Format") or Names.NAMEID_UNSPECIFIED,
        "" if giver == parties.idp else giver,
        "" if asker == parties.sp else asker,
        name_id["Value"],
    )
    return "!".join(one.replace("%", "%25").replace("!", "%21") for one in parts)


def signed_query(text: str) -> dict[str, str]:
    """A message of the redirect binding is signed as it may be; not yet that it is signed right.

    Signatures are of the text, in which names are looked for as they are: what else decodes to
    such a name would be read, and not be signed.

    Raises:
        Refused: it is not, or can be read in two ways.
    """
    said = parse_qsl(text, keep_blank_values=True)
    names, parts = [name for name, _ in said], text.split("&")
    for name in _OF_QUERY:
        written = sum(part.startswith(f"{name}=") for part in parts)
        if not names.count(name) == written <= 1:
            raise Refused(f"{name} is there twice, or written with percent signs", UNSIGNED)
    query = dict(said)
    if "Signature" not in query or query.get("SigAlg") not in RSA_SIGNATURES:
        raise Refused(f"signed with {query.get('SigAlg')}", UNSIGNED)
    return query


def logout(root: Element, name_id: Mapping[str, str], parties: Parties, callback: str) -> Logout:
    """What a request says that the library has found valid and signed.

    Args:
        callback: where it must be meant for, word for word.

    Raises:
        Refused: it says too little, or is not meant for us.
    """
    if [_text(one) for one in _all(root, "./saml:Issuer")] != [parties.idp]:
        raise Refused("the request has another issuer", _SENTENCES[Invalid.WRONG_ISSUER])
    if root.get("Destination") != callback:
        raise Refused(f"destination {root.get('Destination')}", _ELSEWHERE)
    made_at = _time(root.get("IssueInstant"))
    ends_at = made_at + LOGOUT_LIFE
    if root.get("NotOnOrAfter"):
        ends_at = min(ends_at, _time(root.get("NotOnOrAfter")))
    if not made_at - LOGOUT_LIFE < datetime.now(UTC) < ends_at:
        raise Refused(f"made at {made_at}", _TIMES)
    return Logout(
        id=root.get("ID"),
        ends_at=ends_at,
        subject=_subject(name_id, parties),
        session_indexes=frozenset(_text(one) for one in _all(root, "./samlp:SessionIndex")),
    )


def _expect_audience(said: Element, sp: str) -> None:
    restrictions = _all(said, "./saml:Conditions/saml:AudienceRestriction")
    for restriction in restrictions:
        if sp not in [_text(one) for one in _all(restriction, "./saml:Audience")]:
            raise Refused("another audience", _ELSEWHERE)
    if not restrictions:
        raise Refused("no audience", _ELSEWHERE)


def _confirmed_until(said: Element, callback: str, request_id: str) -> datetime:
    """Until when the bearer of the assertion is taken for its subject.

    Raises:
        Refused: never: in each confirmation something is lacking or wrong.
    """
    why = Refused("no bearer confirmation")
    found = []
    for data in _confirmations(said):
        ends_at = data.get("NotOnOrAfter")
        if data.get("Recipient") != callback:
            why = Refused(f"recipient {data.get('Recipient')}", _ELSEWHERE)
        elif data.get("InResponseTo") != request_id:
            why = Refused("the assertion answers another request", _UNASKED)
        elif ends_at is None or _time(ends_at) <= datetime.now(UTC):
            why = Refused(f"confirmed until {ends_at}", _TIMES)
        else:
            found.append(_time(ends_at))
    if not found:
        raise why
    return max(found)


def _confirmations(said: Element) -> Iterator[Element]:
    for one in _all(said, "./saml:Subject/saml:SubjectConfirmation"):
        if one.get("Method") == Names.CM_BEARER:
            yield from _all(one, "./saml:SubjectConfirmationData")


def _all(node: Element, query: str) -> list[Element]:
    found: list[Element] = Xml.query(node, query)
    return found


def _text(node: Element) -> str:
    return (Xml.element_text(node) or "").strip()


def _time(text: str) -> datetime:
    return datetime.fromtimestamp(Utils.parse_SAML_to_time(text), UTC)
