// A real OpenID provider on loopback for tests/e2e/test_oidc.py:
//   PORT=18300 SERVER=http://127.0.0.1:8080 node provider.mjs
// Any login name is accepted at its development login page and becomes the subject.
import Provider from 'oidc-provider';

const port = Number(process.env.PORT);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [{
    client_id: 'gpustack',
    client_secret: process.env.CLIENT_SECRET,
    redirect_uris: [`${process.env.SERVER}/auth/oidc/callback`],
    post_logout_redirect_uris: [`${process.env.SERVER}/`],
    grant_types: ['authorization_code'],
    response_types: ['code'],
  }],
  claims: { openid: ['sub'], profile: ['name', 'preferred_username', 'picture'], email: ['email'] },
  cookies: { keys: ['of one test run'] },
  features: { devInteractions: { enabled: true } },
  findAccount: async (_, id) => ({
    accountId: id,
    claims: async () => ({
      sub: id,
      name: `User ${id}`,
      preferred_username: `${id}.there`,
      picture: `https://id.example/${id}.png`,
      email: `${id}@example.test`,
    }),
  }),
});
provider.listen(port, '127.0.0.1', () => console.log('ready'));
