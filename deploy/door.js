// What nginx.conf asks of this file: who may pass, and which bodies. The server gets the checked values, written anew,
// so no other reading of the client's bytes can differ from this one.

const SERVERS = {predictions: '127.0.0.1:5000', trainings: '127.0.0.1:5001'};
const FIELDS = ['id', 'input', 'webhook', 'webhook_events_filter'];
// (?![\s\S]) is the end of the text: in njs, $ also matches before a last line break.
const ID = /^[A-Za-z0-9_-]{1,64}(?![\s\S])/;
// Without a user name, a password and backslashes, which readers of URLs understand differently.
const URL = /^(https?:\/\/[A-Za-z0-9.:-]+)(\/[\x21-\x5b\x5d-\x7e]*)?(?![\s\S])/;

function answer(r, status, sentence) {
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status, JSON.stringify({detail: sentence}) + '\n');
}

// True if the setting names the origin (such as https://hooks.example.com) of this URL.
function isListed(url, setting) {
    const found = typeof url === 'string' && URL.exec(url);
    return !!found && (process.env[setting] || '').split(/\s+/).indexOf(found[1].toLowerCase()) >= 0;
}

// The digests are compared, so the time does not tell how much of the token is right.
function hasToken(r) {
    const digest = (text) => require('crypto').createHash('sha256').update(text).digest('hex');
    const token = process.env.DOOR_TOKEN;
    return !!token && digest(r.headersIn.Authorization || '') === digest(`Bearer ${token}`);
}

function isObject(value) {
    return typeof value === 'object' && value !== null && !Array.isArray(value);
}

// Why this body may not pass, or nothing. inputs: those that the server knows, from its schema.
function fault(body, pathId, inputs) {
    if (!isObject(body) || !isObject(body.input)) {
        return 'the body must be an object with the inputs in "input"';
    }
    const unknown = Object.keys(body).filter((name) => FIELDS.indexOf(name) < 0);
    if (unknown.length) {
        return `the body may have ${FIELDS.join(', ')} and nothing else`;
    }
    const given = Object.keys(body.input);
    const other = given.filter((name) => !Object.prototype.hasOwnProperty.call(inputs, name));
    if (other.length) {
        return `there is no input ${JSON.stringify(other[0])}; the inputs are ${Object.keys(inputs).sort().join(', ')}`;
    }
    if (body.id !== undefined && !(typeof body.id === 'string' && ID.test(body.id))) {
        return 'an id has 1 to 64 letters, digits, - and _';
    }
    if (pathId && body.id !== undefined && body.id !== pathId) {
        return 'the id of the body is not that of the address';
    }
    if (body.webhook !== undefined && !isListed(body.webhook, 'DOOR_WEBHOOKS')) {
        return 'this webhook is not allowed; the server has a list of allowed ones';
    }
    // Cog downloads inputs that are files from any address. A data URL contacts none.
    const isAllowed = (value) => isListed(value, 'DOOR_IMAGES') || (typeof value === 'string' && /^data:/.test(value));
    const files = given.filter((name) => inputs[name].format === 'uri' && !isAllowed(body.input[name]));
    if (files.length) {
        return `${files[0]} may not come from there; send a data URL, or one from the server's list of addresses`;
    }
}

function parsed(text) {
    try {
        return JSON.parse(text);
    } catch (error) {
        return undefined;
    }
}

// A prediction, a training, or the cancelling of one.
async function check(r) {
    const words = r.uri.split('/');
    const kind = words[1], id = words[2], isCancel = words.length > 3;
    if (!hasToken(r)) {
        r.headersOut['WWW-Authenticate'] = 'Bearer';
        return answer(r, 401, 'send the header Authorization: Bearer TOKEN');
    }
    if (kind === 'trainings' && !process.env.DOOR_TRAININGS) {
        return answer(r, 404, 'this server takes no trainings');
    }
    if (r.method !== (id && !isCancel ? 'PUT' : 'POST')) {
        return answer(r, 405, 'use POST without an id or to cancel, and PUT with an id');
    }
    if (id && !ID.test(id)) {
        return answer(r, 400, 'an id has 1 to 64 letters, digits, - and _');
    }
    r.variables.checked = '';
    if (!isCancel) {
        const schema = await r.subrequest('/door/schema');
        if (schema.status !== 200) {
            return answer(r, 503, 'the server is not ready; try again later');
        }
        const schemas = JSON.parse(schema.responseText).components.schemas;
        const inputs = schemas[kind === 'trainings' ? 'TrainingInput' : 'Input'].properties;
        const body = parsed(r.requestText);
        const why = fault(body, id, inputs);
        if (why) {
            return answer(r, 400, why);
        }
        r.variables.checked = JSON.stringify(body);
    }
    r.variables.upstream = SERVERS[kind];
    r.internalRedirect('@server');
}

// Only the state, without the log of the setup. 200 means that the server takes predictions.
async function health(r) {
    const reply = await r.subrequest('/door/health');
    const status = reply.status === 200 ? JSON.parse(reply.responseText).status : 'UNREACHABLE';
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status === 'READY' || status === 'BUSY' ? 200 : 503, JSON.stringify({status}) + '\n');
}

async function schema(r) {
    if (!hasToken(r)) {
        return answer(r, 401, 'send the header Authorization: Bearer TOKEN');
    }
    const reply = await r.subrequest('/door/schema');
    r.headersOut['Content-Type'] = 'application/json';
    r.return(reply.status, reply.responseText);
}

export default {check, health, schema};
