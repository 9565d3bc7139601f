"""Messages of a SAML identity provider, good ones and forged ones, with keys made on the spot.

Only lxml and xmlsec: nothing of what is tested makes its own tests.
"""

import base64
import copy
import datetime as dt
import hashlib
import zlib
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import xmlsec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID
from lxml import etree

Element = Any

P, A = "urn:oasis:names:tc:SAML:2.0:protocol", "urn:oasis:names:tc:SAML:2.0:assertion"
DS = "http://www.w3.org/2000/09/xmldsig#"
NS = {"samlp": P, "saml": A, "ds": DS}
UNSPECIFIED = "urn:oasis:names:tc:SAML:1.1:nameid-format:unspecified"
IDP, SP = "https://idp.example/metadata", "https://gpu.example/sp"
CALLBACK = "https://gpu.example/auth/saml/callback"
PERSISTENT = "urn:oasis:names:tc:SAML:2.0:nameid-format:persistent"


@dataclass(frozen=True)
class Pair:
    """An RSA key and its certificate, as PEM."""

    key: str
    certificate: str


@cache
def pair(name: str) -> Pair:
    """The same one for the same name, within one process."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return Pair(
        key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        made.public_bytes(pem).decode(),
    )


def at(seconds: float) -> str:
    """A time, from now."""
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Answer:
    """What an answer to a login says; `response` makes it.

    Attributes:
        request: id of the request that is answered; None: the attribute is lacking.
        confirmed_request: the same, in the assertion.
    """

    request: str | None = "_request"
    confirmed_request: str | None = "_request"
    issuer: str = IDP
    audience: str | None = SP
    recipient: str | None = CALLBACK
    destination: str | None = CALLBACK
    name_id: str = "alice"
    format: str | None = PERSISTENT
    name_qualifier: str | None = None
    sp_name_qualifier: str | None = None
    not_before: str = field(default_factory=lambda: at(-60))
    not_on_or_after: str = field(default_factory=lambda: at(300))
    confirmed_until: str | None = field(default_factory=lambda: at(300))
    status: str = "urn:oasis:names:tc:SAML:2.0:status:Success"
    attributes: tuple[tuple[str, str], ...] = (("email", "alice@example.org"), ("name", "Alice"))
    assertion_id: str = field(default_factory=lambda: f"_{uuid4().hex}")

    def but(self, **changes: Any) -> "Answer":
        return replace(self, **changes)


def _optional(name: str, value: str | None) -> str:
    return "" if value is None else f' {name}="{value}"'


def response(answer: Answer) -> Element:
    """A response, unsigned. Its assertion is its last child."""
    attributes = "".join(
        f'<saml:Attribute Name="{name}"><saml:AttributeValue>{value}</saml:AttributeValue>'
        "</saml:Attribute>"
        for name, value in answer.attributes
    )
    audience = (
        ""
        if answer.audience is None
        else "<saml:AudienceRestriction>"
        f"<saml:Audience>{answer.audience}</saml:Audience></saml:AudienceRestriction>"
    )
    xml = f"""<samlp:Response xmlns:samlp="{P}" xmlns:saml="{A}" ID="_{uuid4().hex}" Version="2.0"
 IssueInstant="{at(0)}"{_optional("Destination", answer.destination)}{_optional("InResponseTo", answer.request)}>
<saml:Issuer>{answer.issuer}</saml:Issuer>
<samlp:Status><samlp:StatusCode Value="{answer.status}"/></samlp:Status>
<saml:Assertion ID="{answer.assertion_id}" Version="2.0" IssueInstant="{at(0)}">
<saml:Issuer>{answer.issuer}</saml:Issuer>
<saml:Subject><saml:NameID{_optional("Format", answer.format)}{_optional("NameQualifier", answer.name_qualifier)}{_optional("SPNameQualifier", answer.sp_name_qualifier)}>{answer.name_id}</saml:NameID>
<saml:SubjectConfirmation Method="urn:oasis:names:tc:SAML:2.0:cm:bearer">
<saml:SubjectConfirmationData{_optional("Recipient", answer.recipient)}{_optional("InResponseTo", answer.confirmed_request)}{_optional("NotOnOrAfter", answer.confirmed_until)}/>
</saml:SubjectConfirmation></saml:Subject>
<saml:Conditions NotBefore="{answer.not_before}" NotOnOrAfter="{answer.not_on_or_after}">{audience}</saml:Conditions>
<saml:AuthnStatement AuthnInstant="{at(0)}" SessionIndex="_session"><saml:AuthnContext>
<saml:AuthnContextClassRef>urn:oasis:names:tc:SAML:2.0:ac:classes:Password</saml:AuthnContextClassRef>
</saml:AuthnContext></saml:AuthnStatement>
<saml:AttributeStatement>{attributes}</saml:AttributeStatement>
</saml:Assertion></samlp:Response>"""  # noqa: E501
    return etree.fromstring(xml.replace("\n", ""))


def assertion(root: Element) -> Element:
    (found,) = root.iterfind("saml:Assertion", NS)
    return found


def sign(
    node: Element,
    by: Pair,
    *,
    algorithm: Any = xmlsec.constants.TransformRsaSha256,
    digest: Any = xmlsec.constants.TransformSha256,
    uri: str | None = None,
) -> Element:
    """Sign `node` in place; the signature follows its issuer, as the schema wants it.

    Args:
        uri: what is signed instead.
    """
    template = xmlsec.template.create(node, xmlsec.constants.TransformExclC14N, algorithm)
    node.insert(1, template)
    reference = xmlsec.template.add_reference(
        template, digest, uri=f"#{node.get('ID')}" if uri is None else uri
    )
    xmlsec.template.add_transform(reference, xmlsec.constants.TransformEnveloped)
    xmlsec.template.add_transform(reference, xmlsec.constants.TransformExclC14N)
    xmlsec.template.add_x509_data(xmlsec.template.ensure_key_info(template))
    xmlsec.tree.add_ids(node.getroottree().getroot(), ["ID"])
    context = xmlsec.SignatureContext()
    context.key = xmlsec.Key.from_memory(by.key, xmlsec.constants.KeyDataFormatPem)
    context.key.load_cert_from_memory(by.certificate, xmlsec.constants.KeyDataFormatPem)
    context.sign(template)
    return node


def signed(answer: Answer, by: Pair, *, message: bool = False, assertions: bool = True) -> Element:
    """A response whose assertion is signed, or the message, or both."""
    root = response(answer)
    if assertions:
        sign(assertion(root), by)
    if message:
        sign(root, by)
    return root


def encrypted(root: Element, to: Pair, *, transport: Any = None) -> Element:
    """`root` with its assertion encrypted."""
    node = assertion(root)
    constants = xmlsec.constants
    manager = xmlsec.KeysManager()
    key = xmlsec.Key.from_memory(to.certificate, constants.KeyDataFormatCertPem)
    manager.add_key(key)
    data = xmlsec.template.encrypted_data_create(
        root, constants.TransformAes256Gcm, type=constants.TypeEncElement, ns="xenc"
    )
    xmlsec.template.encrypted_data_ensure_cipher_value(data)
    info = xmlsec.template.encrypted_data_ensure_key_info(data, ns="ds")
    wrapped = xmlsec.template.add_encrypted_key(info, transport or constants.TransformRsaOaep)
    xmlsec.template.encrypted_data_ensure_cipher_value(wrapped)
    context = xmlsec.EncryptionContext(manager)
    context.key = xmlsec.Key.generate(constants.KeyDataAes, 256, constants.KeyDataTypeSession)
    position = root.index(node)
    done = context.encrypt_xml(data, node)
    holder = etree.Element(f"{{{A}}}EncryptedAssertion", nsmap={"saml": A})
    if done.getparent() is not None:
        done.getparent().remove(done)
    holder.append(done)
    root.insert(position, holder)
    return root


def form(root: Element | bytes) -> str:
    """As a browser posts it."""
    xml = root if isinstance(root, bytes) else etree.tostring(root)
    return base64.b64encode(xml).decode()


def logout_request(
    by: Pair,
    *,
    id: str = "_logout",
    name_id: str = "alice",
    format: str | None = PERSISTENT,
    sp_name_qualifier: str | None = None,
    session_index: str | None = None,
    issuer: str = IDP,
    destination: str | None = "https://gpu.example/auth/saml/logout/callback",
    made_at: str | None = None,
    not_on_or_after: str | None = None,
    relay_state: str = "x",
    algorithm: str = "rsa-sha256",
    encrypted_id: str | None = None,
) -> str:
    """A query that asks to end sessions, signed as the redirect binding has it.

    Args:
        algorithm: that it says; it is signed by rsa-sha256 all the same.
        encrypted_id: XML, instead of a NameID.
    """
    index = (
        "" if session_index is None else f"<samlp:SessionIndex>{session_index}</samlp:SessionIndex>"
    )
    name = (
        f"<saml:NameID{_optional('Format', format)}"
        f"{_optional('SPNameQualifier', sp_name_qualifier)}>{name_id}</saml:NameID>"
        if encrypted_id is None
        else f"<saml:EncryptedID>{encrypted_id}</saml:EncryptedID>"
    )
    xml = (
        f'<samlp:LogoutRequest xmlns:samlp="{P}" xmlns:saml="{A}" ID="{id}" Version="2.0" '
        f'IssueInstant="{made_at or at(0)}"{_optional("Destination", destination)}'
        f"{_optional('NotOnOrAfter', not_on_or_after)}><saml:Issuer>{issuer}</saml:Issuer>"
        f"{name}{index}</samlp:LogoutRequest>"
    )
    query = urlencode(
        {
            "SAMLRequest": base64.b64encode(zlib.compress(xml.encode())[2:-4]).decode(),
            "RelayState": relay_state,
            "SigAlg": f"http://www.w3.org/2001/04/xmldsig-more#{algorithm}",
        }
    )
    key = serialization.load_pem_private_key(by.key.encode(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    signature = key.sign(query.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{query}&{urlencode({'Signature': base64.b64encode(signature).decode()})}"


# --- signature wrapping ----------------------------------------------------------------------
# The eight of "On Breaking SAML: Be Whoever You Want to Be" (Somorovsky et al., 2012), in the
# numbers that tools give them. `root` is good; what comes back says to careless readers that its
# user is `victim`, while the signature of what was good stays right.


def wrapped(number: int, good: Element, victim: str) -> Element:
    """The attack of that number on `good`: 1 and 2 need a signed message, others an assertion."""
    forged, good = copy.deepcopy(good), copy.deepcopy(good)
    for name in forged.iterfind(".//saml:NameID", NS):
        name.text = victim
    if number <= 2:
        return _message_wrapped(number, forged, good)
    evil, original = assertion(forged), assertion(good)
    signature = evil.find("ds:Signature", NS)
    evil.remove(signature)
    evil.set("ID", "_evil")
    if number == 3:  # the forged one before the good one
        forged.insert(forged.index(evil) + 1, original)
    elif number == 4:  # the good one inside the forged one
        evil.append(original)
    elif number in {5, 6}:  # the forged one carries the signature of the good one ...
        original.remove(original.find("ds:Signature", NS))
        evil.insert(1, signature)
        (forged if number == 5 else signature).append(original)  # ... beside it, or in that
    elif number == 7:  # the good one in extensions, where schemas let anything be
        extensions = etree.Element(f"{{{P}}}Extensions")
        forged.insert(1, extensions)
        extensions.append(original)
    else:  # 8: the good one in an object of the forged one's signature
        original.remove(original.find("ds:Signature", NS))
        evil.insert(1, signature)
        etree.SubElement(signature, f"{{{DS}}}Object").append(original)
    return forged


def careless(root: Element, certificate: str) -> str:
    """Who is logged in, to whom it is enough that a signature is right of whatever it names."""
    signature = root.find(".//ds:Signature", NS)
    info = signature.find("ds:SignedInfo", NS)
    value = base64.b64decode(signature.find("ds:SignatureValue", NS).text)
    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    key.verify(value, _canonical(info), padding.PKCS1v15(), hashes.SHA256())
    reference = info.find("ds:Reference", NS)
    (named,) = root.xpath("//*[@ID=$id]", id=reference.get("URI")[1:])
    named = copy.deepcopy(named)
    for own in named.findall("ds:Signature", NS):
        named.remove(own)
    found = base64.b64encode(hashlib.sha256(_canonical(named)).digest()).decode()
    assert found == reference.find("ds:DigestValue", NS).text
    name: str = root.find("saml:Assertion/saml:Subject/saml:NameID", NS).text
    return name


def _canonical(node: Element) -> bytes:
    form: bytes = etree.tostring(node, method="c14n", exclusive=True)
    return form


def _message_wrapped(number: int, forged: Element, good: Element) -> Element:
    signature = forged.find("ds:Signature", NS)
    forged.set("ID", "_evil")
    original = copy.deepcopy(good)
    original.remove(original.find("ds:Signature", NS))
    if number == 1:  # the good message in the signature of the forged one
        signature.append(original)
    else:  # 2: beside it
        forged.remove(signature)
        forged.insert(1, original)
        forged.insert(2, signature)
    return forged
